// A thread in place of a side stream, for XLA's CPU platform.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <utility>

#include "transfer.h"
#include "xla/ffi/api/ffi.h"

namespace pool_exchange {

// There is no stream: handlers are called when their operands are there.
using Context = xla::ffi::RunId;
using Stream = xla::ffi::RunId;

struct Flag {
  std::mutex mutex;
  std::condition_variable changed;
  bool landed = false;
};
using Event = std::shared_ptr<Flag>;

class Side {
 public:
  Status Open(int) {
    thread_ = std::thread([this] { Work(); });
    return nullptr;
  }

  Status Close() {
    Enqueue(nullptr);
    thread_.join();
    return nullptr;
  }

  Status Start(Stream, const int32_t* request, const Exchange& exchange, Event* landed) {
    std::copy_n(request, kHeader + exchange.num_slots, const_cast<int32_t*>(exchange.request));
    *landed = std::make_shared<Flag>();
    Enqueue([this, exchange, flag = *landed] {
      gate_.Pass();
      Copy(exchange);
      Raise(*flag);
    });
    return nullptr;
  }

  // Waits for all that was started.
  Status Drain() {
    Event all = std::make_shared<Flag>();
    Enqueue([all] { Raise(*all); });
    return Wait({}, all);
  }

  static Status Wait(Stream, const Event& flag) {
    std::unique_lock<std::mutex> lock(flag->mutex);
    flag->changed.wait(lock, [&] { return flag->landed; });
    return nullptr;
  }

  static void Forget(const Event&) {}

  void Hold(bool held) { gate_.Set(!held); }

 private:
  static void Raise(Flag& flag) {
    std::lock_guard<std::mutex> lock(flag.mutex);
    flag.landed = true;
    flag.changed.notify_all();
  }

  static void Copy(const Exchange& exchange) {
    const uint64_t low = static_cast<uint32_t>(exchange.request[0]);
    const uint64_t high = static_cast<uint32_t>(exchange.request[1]);
    char* host = reinterpret_cast<char*>(high << 32 | low);
    for (int64_t i = 0; i < exchange.num_slots; ++i) {
      const Move move(exchange.request[kHeader + i]);
      if (move.block < 0 || move.block >= exchange.request[2]) continue;
      char* slot = exchange.pool + i * exchange.block_bytes;
      char* block = host + move.block * exchange.block_bytes;
      std::memcpy(move.to_host ? block : slot, move.to_host ? slot : block, exchange.block_bytes);
    }
  }

  void Enqueue(std::function<void()> job) {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push(std::move(job));
    changed_.notify_all();
  }

  void Work() {
    while (true) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return !jobs_.empty(); });
      std::function<void()> job = std::move(jobs_.front());
      jobs_.pop();
      lock.unlock();
      if (!job) return;
      job();
    }
  }

  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::queue<std::function<void()>> jobs_;
  Gate gate_;
};

inline int CurrentDevice() { return 0; }

inline Status Pin(void* memory, int64_t, void** address) {
  *address = memory;
  return nullptr;
}

inline Status Unpin(void*) { return nullptr; }

inline Status Store(int, void* memory, const void* source, int64_t bytes) {
  std::memcpy(memory, source, bytes);
  return nullptr;
}

}  // namespace pool_exchange
