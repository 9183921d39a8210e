// What the two kinds of side streams share.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace pool_exchange {

// Numbers of a request in front of those of its blocks.
constexpr int kHeader = 3;
// What went wrong; null for nothing.
using Status = const char*;

#ifdef __CUDACC__
#define ON_BOTH __host__ __device__
#else
#define ON_BOTH
#endif

// What the number of a slot asks for: `n` block n of the host to the slot, `-2 - n` the slot to block n
// of the host, -1 nothing, which block -1 stands for.
struct Move {
  ON_BOTH explicit Move(int32_t number)
      : to_host(number < -1), block(to_host ? -2 - static_cast<int64_t>(number) : number) {}
  bool to_host;
  int64_t block;
};

#undef ON_BOTH

// Of blocks between slots of a pool and the host, in place.
struct Exchange {
  // Behind the header the number of a `Move` for each slot.
  const int32_t* request;
  int64_t num_slots;
  char* pool;
  int64_t block_bytes;
  int64_t num_ctas;
};

// Tests close it to see what becomes of a transfer that stands still; it opens again by itself, so that
// a driver that waits for the transfer does not wait for ever.
class Gate {
 public:
  void Set(bool open) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = open;
    changed_.notify_all();
  }
  void Pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(10), [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
};

}  // namespace pool_exchange
