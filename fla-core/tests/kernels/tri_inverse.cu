// tri_inverse: the inverse of one unit lower triangular matrix.
//
//   y = (I + L)^-1
//
// Reference  none: building block test
// Launch     grid 1, block 32, or 64 for C = 64
// FLA        solve_tril
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/tri_inverse.cuh>

namespace fla::test {

struct TriInverseParams {
    const float* l;  // [C, C]  what is on and above the diagonal is not used
    float* y;        // [C, C]
};

template <class Cfg>
__device__ void tri_inverse(const TriInverseParams& p) {
    constexpr int C = Cfg::C;
    constexpr int THREADS = 32 * TRI_INVERSE_WARPS<C>;
    constexpr Merge MERGE = Cfg::TF32X3 ? Merge::TF32X3 : Merge::TF32;
    __shared__ SharedTile<float, C, C> s;  // [C, C]
    for (int i = threadIdx.x; i < C * C; i += THREADS) s.at(i / C, i % C) = p.l[i];
    __syncthreads();  // s is complete
    fla::tri_inverse<MERGE>(s, threadIdx.x / 32, 1);
    for (int i = threadIdx.x; i < C * C; i += THREADS) p.y[i] = s.at(i / C, i % C);
}

}  // namespace fla::test
