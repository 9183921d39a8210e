// Moves blocks between a pool and the host in place, beside what XLA's stream does.
//
// `exchange` lets a side stream wait for what XLA's stream was told so far, enqueues the moves there and
// returns; `join`, or the next exchange of the pool, lets XLA's stream wait for them. Between the two
// nobody may write a slot that is moved, nor read one that is filled. Exchanges follow one another: what
// one brings to the host, the next can bring back. Pools are told apart by their addresses, so that a copy
// that a compiler made of one is refused. The request is copied to a mailbox that stays where it is, as the
// pool does: XLA gives other memory away while it is still read.
//
// A request is int32 [3 + slots]: the address of the host's blocks in two halves, their number, then a
// `Move` for each slot of the pool; blocks that the host has not are left out.
//
// Compiled without CUDA it is the same protocol for XLA's CPU platform.

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "devices.h"
#include "transfer.h"
#include "xla/ffi/api/ffi.h"

namespace pool_exchange {

// By the first words the caller knows what failed.
ffi::Error ExchangeError(const char* reason) {
  return ffi::Error::Internal(std::string("exchange of blocks: ") + reason);
}

// Lets a stream wait for the exchange of a pool that was started last.
ffi::Error Finish(Stream stream, const void* pool) {
  std::unique_lock<std::mutex> lock(mutex);
  Device* device = Find(CurrentDevice());
  if (!device) return ExchangeError(kClosed);
  auto entry = device->exchanges.find(pool);
  if (entry == device->exchanges.end()) return ExchangeError("none was started with this pool");
  Event landed = entry->second;
  device->exchanges.erase(entry);
  lock.unlock();  // here a thread of the CPU platform may have to wait
  Status status = Side::Wait(stream, landed);
  Side::Forget(landed);
  return status ? ExchangeError(status) : ffi::Error::Success();
}

ffi::Error StartExchange(Stream stream, ffi::AnyBuffer pool, ffi::Buffer<ffi::S32> mailbox,
                         ffi::Buffer<ffi::S32> request, ffi::Result<ffi::AnyBuffer> out,
                         ffi::Result<ffi::Buffer<ffi::S32>> kept, bool under_way,
                         int64_t num_ctas) {
  const int64_t num_slots = static_cast<int64_t>(request.element_count()) - kHeader;
  const int64_t pool_bytes = static_cast<int64_t>(pool.size_bytes());
  if (num_slots < 1 || pool_bytes % num_slots || pool.untyped_data() != out->untyped_data() ||
      mailbox.untyped_data() != kept->untyped_data() ||
      mailbox.element_count() != request.element_count()) {
    return ExchangeError("it is for all slots of a pool, in place");
  }
  if (under_way) {
    if (ffi::Error error = Finish(stream, pool.untyped_data()); error.failure()) return error;
  }
  std::lock_guard<std::mutex> lock(mutex);
  Device* device = Find(CurrentDevice());
  if (!device) return ExchangeError(kClosed);
  const Exchange exchange{kept->typed_data(), num_slots, static_cast<char*>(out->untyped_data()),
                          pool_bytes / num_slots, num_ctas};
  Event landed;
  if (Status status = device->side.Start(stream, request.typed_data(), exchange, &landed)) {
    return ExchangeError(status);
  }
  auto [entry, added] = device->exchanges.try_emplace(exchange.pool, landed);
  if (!added) {  // of an exchange that nobody joined
    Side::Forget(entry->second);
    entry->second = landed;
  }
  return ffi::Error::Success();
}

ffi::Error Join(Stream stream, ffi::AnyBuffer pool, ffi::Buffer<ffi::S32> mailbox,
                ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::S32>> kept) {
  if (pool.untyped_data() != out->untyped_data() ||
      mailbox.untyped_data() != kept->untyped_data()) {
    return ExchangeError("it is joined in place");
  }
  return Finish(stream, pool.untyped_data());
}

}  // namespace pool_exchange

XLA_FFI_DEFINE_HANDLER_SYMBOL(AsaExchange, pool_exchange::StartExchange,
                              ffi::Ffi::Bind()
                                  .Ctx<pool_exchange::Context>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<bool>("under_way")
                                  .Attr<int64_t>("num_ctas"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(AsaJoin, pool_exchange::Join,
                              ffi::Ffi::Bind()
                                  .Ctx<pool_exchange::Context>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

using pool_exchange::Status;

// Every `AsaOpen` of a device is followed by one `AsaClose`; the last one ends its side stream.
extern "C" Status AsaOpen(int number) {
  std::lock_guard<std::mutex> lock(pool_exchange::mutex);
  auto& device = pool_exchange::devices[number];
  if (!device) {
    device = std::make_unique<pool_exchange::Device>();
    if (Status status = device->side.Open(number)) {
      pool_exchange::devices.erase(number);
      return status;
    }
  }
  ++device->users;
  return nullptr;
}

extern "C" Status AsaClose(int number) {
  std::lock_guard<std::mutex> lock(pool_exchange::mutex);
  pool_exchange::Device* device = pool_exchange::Find(number);
  if (!device) return pool_exchange::kClosed;
  if (--device->users) return nullptr;
  for (auto& [pool, landed] : device->exchanges) pool_exchange::Side::Forget(landed);
  Status status = device->side.Close();
  pool_exchange::devices.erase(number);
  return status;
}

extern "C" Status AsaPin(void* memory, int64_t bytes, void** address) {
  return pool_exchange::Pin(memory, bytes, address);
}

extern "C" Status AsaUnpin(void* memory) { return pool_exchange::Unpin(memory); }

// Copies from memory of the device, on which nothing writes it now, to pinned memory.
extern "C" Status AsaStore(int number, void* memory, const void* source, int64_t bytes) {
  return pool_exchange::Store(number, memory, source, bytes);
}

// For tests: what is started from now on stands still until this is called with 0.
extern "C" void AsaHold(int number, int held) {
  std::lock_guard<std::mutex> lock(pool_exchange::mutex);
  if (pool_exchange::Device* device = pool_exchange::Find(number)) device->side.Hold(held);
}

// Waits until nothing is on its way.
extern "C" Status AsaDrain(int number) {
  std::unique_lock<std::mutex> lock(pool_exchange::mutex);
  pool_exchange::Device* device = pool_exchange::Find(number);
  if (!device) return pool_exchange::kClosed;
  lock.unlock();  // the caller keeps the device open
  return device->side.Drain();
}
