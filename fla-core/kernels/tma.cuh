// tma: bulk copies between global and shared memory. One thread starts a copy; a load ends on a barrier, a store in a
// group that the same thread waits for.
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/prelude.cuh>

namespace fla {

static_assert(__CUDA_ARCH__ >= 900, "bulk copies need sm_90 or later: include this header from a kernel for sm_90a");

// Copies `bytes` in a line, a multiple of 16 between addresses that are multiples of 16; counts them at `bar`.
__device__ inline void cp_async_bulk_shared_global(void* s_dst, const void* src, u32 bytes, Barrier& bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(shared_addr(s_dst)), "l"(src), "r"(bytes), "r"(shared_addr(&bar))
                 : "memory");
}

// The way back. The source must be visible to the copy engine: `fence_proxy_async` by its writers, then a barrier.
__device__ inline void cp_async_bulk_global_shared(void* dst, const void* s_src, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :
                 : "l"(dst), "r"(shared_addr(s_src)), "r"(bytes)
                 : "memory");
}

// Closes the group of this thread's bulk stores since the last call.
__device__ inline void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }

// Waits until at most PENDING of this thread's youngest groups are under way; the older ones have arrived.
template <int PENDING>
__device__ void cp_async_bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" : : "n"(PENDING) : "memory");
}

// The same, but the older groups have only been read: their shared memory is free to be written again.
template <int PENDING>
__device__ void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING) : "memory");
}

// Fetches the descriptor itself, whose first use would otherwise wait for it.
__device__ inline void prefetch_tensormap(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
}

// Copies the box whose first element is (x, y), x along the contiguous dim. Elements outside of the tensor are zeros
// and are counted at `bar` like the others: a box always brings its full number of bytes. `x` lies at a multiple of 16
// bytes: with any other an H200 raises an illegal instruction.
__device__ inline void cp_async_bulk_tensor_2d_shared_global(
    void* s_dst, const TensorMap& map, i32 x, i32 y, Barrier& bar
) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(shared_addr(s_dst)), "l"(&map), "r"(x), "r"(y), "r"(shared_addr(&bar))
        : "memory");
}

// The way back; elements outside of the tensor are not written. `x` and `y` are at least 0, which an H200 insists on, and
// rows of the tensor end at a multiple of 16 bytes, or what is left of the last 16 bytes is written too.
__device__ inline void cp_async_bulk_tensor_2d_global_shared(const TensorMap& map, i32 x, i32 y, const void* s_src) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 :
                 : "l"(&map), "r"(x), "r"(y), "r"(shared_addr(s_src))
                 : "memory");
}

}  // namespace fla
