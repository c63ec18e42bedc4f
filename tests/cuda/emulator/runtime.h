// Settings of the emulated CUDA runtime, and the end of its launches.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace emulator {

// How many GPUs there are, and how many multiprocessors each has.
void set_devices(int count, int multiprocessors);

// Bytes of shared memory that a kernel can have.
void set_shared_bytes(size_t bytes);
// Of dynamic shared memory, that the kernel asked for which was launched last.
size_t shared_bytes_of_last_launch();

// Whether some thread captures a stream. Then calls that would spoil the capture are refused on
// threads whose capture mode is not relaxed. CUDA does so for captures in mode "global".
void set_capturing(bool capturing);

// Whether the GPUs' links have native atomics, as NVLink has.
void set_native_atomics(bool native);

// Launches a kernel as cudaLaunchKernel() does, and records `begun` when all of its CTAs have
// begun; null: it does not.
cudaError_t launch_kernel(const void* function, unsigned ctas, unsigned threads, void** arguments,
                          size_t shared_bytes, cudaStream_t stream, cudaEvent_t begun);

// Runs all launches. Returns the error, or "".
std::string synchronize();

}  // namespace emulator
