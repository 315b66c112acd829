// barrier: a ring of two buffers between two warps on mbarriers, then a named barrier on the way back.
//
//   y[i, l] = 2 x[i, 31 - l];  z[l] = sum of y[i, 31 - l] over i
//
// Reference  none: building block test
// Launch     grid 1, block 64, dependent on the launch before
// FLA        -
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::test {

struct BarrierParams {
    const float* x;  // [N, 32]
    float* y;        // [N, 32]
    float* z;        // [32]
    i32 n;
};

template <class Cfg>
__device__ void barrier(const BarrierParams& p) {
    constexpr int STAGES = 2;
    constexpr int DONE = 1;
    __shared__ Barrier full[STAGES];
    __shared__ Barrier free[STAGES];
    __shared__ float s_x[STAGES][32];  // [STAGES, 32]
    __shared__ float s_sum[32];        // [32]
    const int lane = lane_id();

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full[i], 32);
            mbarrier_init(free[i], 32);
        }
        fence_mbarrier_init();  // the barriers are visible to the whole block after the next barrier
    }
    griddepcontrol_wait();  // what the launch before wrote is visible
    griddepcontrol_launch_dependents();
    __syncthreads();  // full and free are initialised

    if (threadIdx.x < 32) {
        for (int i = 0; i < p.n; ++i) {
            const int stage = i % STAGES, round = i / STAGES;
            // A buffer is free before its first round: the wait for the phase before the first one returns at once.
            mbarrier_wait_parity(free[stage], (round + 1) % 2);  // s_x[stage] has been read
            s_x[stage][lane] = 2.0f * p.x[i * 32 + lane];
            mbarrier_arrive(full[stage]);  // s_x[stage] is complete when all lanes have arrived
        }
        bar_sync(DONE, 64);  // s_sum is complete
        p.z[lane] = s_sum[31 - lane];
    } else {
        float sum = 0.0f;
        for (int i = 0; i < p.n; ++i) {
            const int stage = i % STAGES, round = i / STAGES;
            mbarrier_wait_parity(full[stage], round % 2);  // s_x[stage] is complete
            const float x = s_x[stage][31 - lane];
            mbarrier_arrive(free[stage]);  // this lane has read s_x[stage]
            p.y[i * 32 + lane] = x;
            sum += x;
        }
        s_sum[lane] = sum;
        bar_arrive(DONE, 64);  // this warp's part of s_sum is complete
    }
}

}  // namespace fla::test
