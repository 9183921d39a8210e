// Gathers blocks of host memory into a buffer of the device beside what XLA's stream does.
//
// `start` lets a side stream wait for what XLA's stream was told so far, enqueues the gather there and
// returns; `place` lets XLA's stream wait for that gather and copies its blocks to slots of a pool.
// Buffers are told apart by their addresses: one into which no gather was started, such as a copy that a
// compiler made of one, is refused, because it may hold anything. Between the two the caller keeps
// both results of `start`; data dependence does so inside one program.
//
// Compiled without CUDA it is the same protocol for XLA's CPU platform.
//
// A request is int32 [3 + n]: the address of the host's blocks in two halves, their number, then the n
// blocks to gather; what is not a number of a block is left out.

#include <cstdint>
#include <memory>
#include <mutex>

#include "devices.h"
#include "pool_exchange.h"
#include "transfer.h"
#include "xla/ffi/api/ffi.h"

namespace block_gather {

ffi::Error Start(Stream stream, ffi::Buffer<ffi::S32> request, ffi::Result<ffi::AnyBuffer> staging,
                 ffi::Result<ffi::Buffer<ffi::S32>> kept_request, int64_t num_ctas) {
  const int64_t num_blocks = static_cast<int64_t>(request.element_count()) - kHeader;
  if (num_blocks < 1 || kept_request->element_count() != request.element_count() ||
      staging->dimensions().front() != num_blocks) {
    return ffi::Error::InvalidArgument("a request is for as many blocks as are staged");
  }
  std::lock_guard<std::mutex> lock(mutex);
  Device* device = Find(CurrentDevice());
  if (!device) return ffi::Error::Internal(kClosed);
  const Gather gather{kept_request->typed_data(), num_blocks,
                      static_cast<char*>(staging->untyped_data()),
                      static_cast<int64_t>(staging->size_bytes()) / num_blocks, num_ctas};
  Event landed;
  Status status = device->side.Start(stream, request.typed_data(), gather, &landed);
  if (status) return ToError(status);
  auto [entry, added] = device->gathers.try_emplace(gather.staging, landed);
  if (!added) {  // of a gather that nobody placed
    Side::Forget(entry->second);
    entry->second = landed;
  }
  return ffi::Error::Success();
}

ffi::Error Place(Stream stream, ffi::AnyBuffer pool, ffi::AnyBuffer staging,
                 ffi::Buffer<ffi::S32> kept_request, ffi::Buffer<ffi::S32> which,
                 ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t num_staged = static_cast<int64_t>(kept_request.element_count()) - kHeader;
  const int64_t staged_bytes = static_cast<int64_t>(staging.size_bytes());
  const int64_t pool_bytes = static_cast<int64_t>(pool.size_bytes());
  const int64_t block_bytes = num_staged > 0 ? staged_bytes / num_staged : 0;
  if (block_bytes < 1 || which.element_count() != slots.element_count() ||
      pool_bytes % block_bytes || pool.untyped_data() != out->untyped_data()) {
    return ffi::Error::InvalidArgument("a pool is of blocks like the staged ones, in place");
  }
  std::unique_lock<std::mutex> lock(mutex);
  Device* device = Find(CurrentDevice());
  if (!device) return ffi::Error::Internal(kClosed);
  auto entry = device->gathers.find(staging.untyped_data());
  if (entry == device->gathers.end()) {
    return ffi::Error::Internal("no gather was started into this buffer");
  }
  Event landed = entry->second;
  device->gathers.erase(entry);
  // Here a thread of the CPU platform may have to wait, while the device may be closed.
  lock.unlock();
  Status status = Side::Wait(stream, landed);
  Side::Forget(landed);
  if (status) return ToError(status);
  return ToError(Side::Place(
      stream, {static_cast<const char*>(staging.untyped_data()), num_staged, which.typed_data(),
               slots.typed_data(), static_cast<int64_t>(which.element_count()),
               static_cast<char*>(out->untyped_data()), pool_bytes / block_bytes, block_bytes}));
}

}  // namespace block_gather

using block_gather::Status;

XLA_FFI_DEFINE_HANDLER_SYMBOL(AsaStart, block_gather::Start,
                              ffi::Ffi::Bind()
                                  .Ctx<block_gather::Context>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("num_ctas"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(AsaPlace, block_gather::Place,
                              ffi::Ffi::Bind()
                                  .Ctx<block_gather::Context>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

// Every `AsaOpen` of a device is followed by one `AsaClose`; the last one ends its side stream.
extern "C" Status AsaOpen(int number) {
  std::lock_guard<std::mutex> lock(block_gather::mutex);
  auto& device = block_gather::devices[number];
  if (!device) {
    device = std::make_unique<block_gather::Device>();
    if (Status status = device->side.Open(number)) {
      block_gather::devices.erase(number);
      return status;
    }
  }
  ++device->users;
  return nullptr;
}

extern "C" Status AsaClose(int number) {
  std::lock_guard<std::mutex> lock(block_gather::mutex);
  block_gather::Device* device = block_gather::Find(number);
  if (!device) return block_gather::kClosed;
  if (--device->users) return nullptr;
  for (auto& [staging, landed] : device->gathers) block_gather::Side::Forget(landed);
  Status status = device->side.Close();
  block_gather::devices.erase(number);
  return status;
}

extern "C" Status AsaPin(void* memory, int64_t bytes, void** address) {
  return block_gather::Pin(memory, bytes, address);
}

extern "C" Status AsaUnpin(void* memory) { return block_gather::Unpin(memory); }

// -1: no gather fills this buffer; 0: it is on its way; 1: it landed; 2: it failed, see `status`.
extern "C" int AsaState(int number, const void* staging, Status* status) {
  std::lock_guard<std::mutex> lock(block_gather::mutex);
  *status = nullptr;
  block_gather::Device* device = block_gather::Find(number);
  if (!device) return -1;
  auto entry = device->gathers.find(staging);
  if (entry == device->gathers.end()) return -1;
  const bool landed = block_gather::Side::Landed(entry->second, status);
  return *status ? 2 : landed;
}

// For tests: what is started from now on stands still until this is called with 0.
extern "C" void AsaHold(int number, int held) {
  std::lock_guard<std::mutex> lock(block_gather::mutex);
  if (block_gather::Device* device = block_gather::Find(number)) device->side.Hold(held);
}
