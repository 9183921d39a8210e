// A side stream of a GPU, with a kernel that reads and writes pinned memory of the host.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "transfer.h"
#include "xla/ffi/api/ffi.h"

#define RETURN_IF_FAILED(call) \
  if (cudaError_t error = (call)) return pool_exchange::Said(error)

namespace pool_exchange {

// Also takes the error back, so that the next launch is not blamed for it.
inline Status Said(cudaError_t error) {
  cudaGetLastError();
  return cudaGetErrorString(error);
}

using Context = xla::ffi::PlatformStream<cudaStream_t>;
using Stream = cudaStream_t;
using Event = cudaEvent_t;
constexpr int kThreads = 512;

// All loads of a step are under way before its first store, so that few threads fill the bus.
template <typename Vector>
__device__ void CopyBlock(const char* from_bytes, char* to_bytes, int64_t bytes) {
  constexpr int kUnroll = 4;
  const Vector* from = reinterpret_cast<const Vector*>(from_bytes);
  Vector* to = reinterpret_cast<Vector*>(to_bytes);
  const int64_t size = bytes / static_cast<int64_t>(sizeof(Vector));
  for (int64_t first = threadIdx.x; first < size; first += kUnroll * kThreads) {
    Vector values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads < size) values[i] = __ldcs(from + first + i * kThreads);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * kThreads < size) to[first + i * kThreads] = values[i];
    }
  }
}

// Most slots are asked nothing of, so the threads of a block look at many of them at a time.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) ExchangeBlocks(Exchange exchange) {
  __shared__ int count;
  __shared__ int64_t found[kThreads];
  const uint64_t low = static_cast<uint32_t>(exchange.request[0]);
  const uint64_t high = static_cast<uint32_t>(exchange.request[1]);
  char* host = reinterpret_cast<char*>(high << 32 | low);
  const int64_t ctas = gridDim.x;
  for (int64_t first = 0; first < exchange.num_slots; first += kThreads * ctas) {
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int64_t mine = first + threadIdx.x * ctas + blockIdx.x;
    if (mine < exchange.num_slots) {
      const int64_t block = Move(exchange.request[kHeader + mine]).block;
      if (block >= 0 && block < exchange.request[2]) found[atomicAdd(&count, 1)] = mine;
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const Move move(exchange.request[kHeader + found[i]]);
      char* slot = exchange.pool + found[i] * exchange.block_bytes;
      char* block = host + move.block * exchange.block_bytes;
      CopyBlock<Vector>(move.to_host ? slot : block, move.to_host ? block : slot,
                        exchange.block_bytes);
    }
    __syncthreads();
  }
}

class Side {
 public:
  Status Open(int device) {
    RETURN_IF_FAILED(cudaSetDevice(device));
    RETURN_IF_FAILED(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    RETURN_IF_FAILED(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming));
    return nullptr;
  }

  Status Close() {
    RETURN_IF_FAILED(cudaStreamSynchronize(stream_));
    RETURN_IF_FAILED(cudaEventDestroy(ready_));
    RETURN_IF_FAILED(cudaStreamDestroy(stream_));
    return nullptr;
  }

  Status Start(Stream main, const int32_t* request, const Exchange& exchange, Event* landed) {
    const size_t bytes = (kHeader + exchange.num_slots) * sizeof(int32_t);
    // XLA may give the request's memory away as soon as its own stream is past this point.
    RETURN_IF_FAILED(cudaMemcpyAsync(const_cast<int32_t*>(exchange.request), request, bytes,
                                     cudaMemcpyDeviceToDevice, main));
    RETURN_IF_FAILED(cudaEventRecord(ready_, main));
    RETURN_IF_FAILED(cudaStreamWaitEvent(stream_, ready_, 0));
    if (held_) RETURN_IF_FAILED(cudaLaunchHostFunc(stream_, PassGate, &gate_));
    // Before the moves, so that none is ever under way that nobody can wait for.
    RETURN_IF_FAILED(cudaEventCreateWithFlags(landed, cudaEventDisableTiming));
    if (cudaError_t error = Launch(exchange, *landed)) {
      Forget(*landed);
      return Said(error);
    }
    return nullptr;
  }

  // Waits for all that was started.
  Status Drain() {
    RETURN_IF_FAILED(cudaStreamSynchronize(stream_));
    return nullptr;
  }

  static Status Wait(Stream main, Event landed) {
    RETURN_IF_FAILED(cudaStreamWaitEvent(main, landed, 0));
    return nullptr;
  }

  static void Forget(Event landed) { cudaEventDestroy(landed); }

  void Hold(bool held) {
    held_ = held;
    gate_.Set(!held);
  }

 private:
  cudaError_t Launch(const Exchange& exchange, Event landed) {
    if (exchange.block_bytes % sizeof(uint4)) {
      ExchangeBlocks<char><<<exchange.num_ctas, kThreads, 0, stream_>>>(exchange);
    } else {
      ExchangeBlocks<uint4><<<exchange.num_ctas, kThreads, 0, stream_>>>(exchange);
    }
    const cudaError_t error = cudaGetLastError();
    return error ? error : cudaEventRecord(landed, stream_);
  }

  static void PassGate(void* gate) { static_cast<Gate*>(gate)->Pass(); }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t ready_ = nullptr;
  bool held_ = false;
  Gate gate_;
};

inline int CurrentDevice() {
  int device = -1;
  cudaGetDevice(&device);
  return device;
}

inline Status Pin(void* memory, int64_t bytes, void** address) {
  RETURN_IF_FAILED(
      cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
  if (cudaError_t error = cudaHostGetDevicePointer(address, memory, 0)) {
    cudaHostUnregister(memory);
    return Said(error);
  }
  return nullptr;
}

inline Status Unpin(void* memory) {
  RETURN_IF_FAILED(cudaHostUnregister(memory));
  return nullptr;
}

inline Status Store(int device, void* memory, const void* source, int64_t bytes) {
  RETURN_IF_FAILED(cudaSetDevice(device));
  RETURN_IF_FAILED(cudaMemcpy(memory, source, bytes, cudaMemcpyDeviceToHost));
  return nullptr;
}

}  // namespace pool_exchange

#undef RETURN_IF_FAILED
