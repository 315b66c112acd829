// barrier: named barriers among some warps of a block, and on sm_90 and later mbarriers, the proxy fence and the two
// halves of programmatic dependent launch.
#pragma once
#include <fla/core/prelude.cuh>

namespace fla {

// Waits for `threads` threads (whole warps) at barrier `id`, 1 to 15; 0 is `__syncthreads`. What they wrote to shared
// memory before is visible to all of them after.
__device__ inline void bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// Counts this thread at barrier `id` and goes on; the threads that wait there are counted in `threads` too.
__device__ inline void bar_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// A barrier object in shared memory. It completes a phase when its count of arrivals and all announced bytes are in;
// waiting names the parity of a phase, which starts at 0.
struct alignas(8) Barrier {
    u64 state;
};

// Expects `count` arrivals per phase. One thread calls it; then `fence_mbarrier_init` and a block barrier.
__device__ inline void mbarrier_init(Barrier& bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_addr(&bar)), "r"(count) : "memory");
}

// Makes initialised barriers visible to bulk copies and to the other blocks of a cluster.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }

// One arrival; what this thread wrote before is visible to whoever waits for the phase.
__device__ inline void mbarrier_arrive(Barrier& bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_addr(&bar)) : "memory");
}

// One arrival that also announces `bytes` of bulk copies, without which the phase does not complete.
__device__ inline void mbarrier_arrive_expect_tx(Barrier& bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(shared_addr(&bar)), "r"(bytes)
                 : "memory");
}

// Whether the phase of this parity is complete; the hardware may suspend the thread for a while before it says no.
__device__ inline bool mbarrier_try_wait_parity(Barrier& bar, u32 parity) {
    u32 complete;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_addr(&bar)), "r"(parity)
        : "memory");
    return complete != 0;
}

// Waits for the phase of this parity. What was written before its arrivals, and its bulk copies, are visible after.
__device__ inline void mbarrier_wait_parity(Barrier& bar, u32 parity) {
    while (!mbarrier_try_wait_parity(bar, parity)) {
    }
}

// Makes this thread's ordinary writes to shared memory visible to the engines that read it by themselves: bulk copies
// and wgmma. A barrier comes after it when another thread starts the engine.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// Waits until the kernels that this launch depends on have finished and their memory is visible; returns at once when
// there are none.
__device__ inline void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" : : : "memory"); }

// Lets the next kernel of a dependent launch start; it promises nothing about memory.
__device__ inline void griddepcontrol_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}

// This block's number in its cluster, and the blocks of the cluster; 0 and 1 without one.
__device__ inline u32 cluster_ctarank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline u32 cluster_nctarank() {
    u32 blocks;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}

}  // namespace fla
