// copy: vector loads and stores, and asynchronous copies that end inside their 16 bytes.
//
//   y = x with the N elements of every vector in reverse order
//   z = the first i % (E + 1) elements of the i-th 16 bytes of x, which hold E; zeros for the rest
//
// Reference  none: building block test
// Launch     grid 1, block 64
// FLA        -
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>

namespace fla::test {

template <class T>
struct CopyParams {
    const T* x;  // [64 E]
    T* y;        // [64 E]
    T* z;        // [64 E]
};

template <class Cfg>
__device__ void copy(const CopyParams<typename Cfg::T>& p) {
    using T = typename Cfg::T;
    constexpr int N = Cfg::N;
    constexpr int E = 16 / sizeof(T);
    const int i = threadIdx.x;

    #pragma unroll
    for (int first = i * N; first < 64 * E; first += 64 * N) {
        Vec<T, N> x;
        if constexpr (Cfg::STREAM) {
            x = load_stream<N>(p.x + first);
        } else {
            x = load_nc<N>(p.x + first);
        }
        Vec<T, N> y;
        #pragma unroll
        for (int e = 0; e < N; ++e) y.at[e] = x.at[N - 1 - e];
        if constexpr (Cfg::STREAM) {
            store_stream(p.y + first, y);
        } else {
            store(p.y + first, y);
        }
    }

    __shared__ alignas(16) T s[64 * E];  // [64, E]
    // Ones, so that zeros in the result were written by the copy.
    #pragma unroll
    for (int e = 0; e < E; ++e) s[i * E + e] = from_f32<T>(1.0f);
    cp_async_cg_16(&s[i * E], p.x + i * E, i % (E + 1) * sizeof(T));
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncthreads();  // s is complete
    #pragma unroll
    for (int e = 0; e < E; ++e) p.z[e * 64 + i] = s[e * 64 + i];
}

}  // namespace fla::test
