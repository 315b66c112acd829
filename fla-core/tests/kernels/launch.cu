// launch: one step of a chain of launches, and what each block knows of its cluster.
//
//   y = x + 1;  rank[block] = 100 (blocks of the cluster) + (number in the cluster)
//
// Reference  none: building block test
// Launch     grid ceil(n / 128), block 128
// FLA        -
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/prelude.cuh>

namespace fla::test {

struct LaunchParams {
    const float* x;  // [n]
    float* y;        // [n]
    float* rank;     // [blocks]
    i32 n;
};

template <class Cfg>
__device__ void launch(const LaunchParams& p) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();  // what the launch before has written is visible
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.n) p.y[i] = p.x[i] + 1.0f;
    if (threadIdx.x == 0) p.rank[blockIdx.x] = float(100 * cluster_nctarank() + cluster_ctarank());
}

}  // namespace fla::test
