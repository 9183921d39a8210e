// The side streams of this process and what they are to do yet.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#ifdef __CUDACC__
#include "side_cuda.h"
#else
#include "side_cpu.h"
#endif
#include "transfer.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace pool_exchange {

struct Device {
  Side side;
  int users = 0;
  // By the address of the pool.
  std::map<const void*, Event> exchanges;
};

constexpr char kClosed[] = "the side stream of this device is closed";

// Never destroyed: a thread of XLA may still be in here when the process ends.
inline std::mutex& mutex = *new std::mutex;
inline std::map<int, std::unique_ptr<Device>>& devices = *new std::map<int, std::unique_ptr<Device>>;

inline Device* Find(int number) {
  auto found = devices.find(number);
  return found == devices.end() ? nullptr : found->second.get();
}

}  // namespace pool_exchange
