// chunk_bwd_output_sm90: gradients of queries and keys, summed over the value heads that share them.
//
//   dq_i = sum_j dq_parts[i, j]        dk_i = sum_j dk_parts[i, j]        for value heads j of query head i      (1)
//
// It is what `chunk_bwd_sm90` leaves of the stage. The terms are added in their order, so the same inputs give the same bits.
//
// Reference  fla_reference::gated_delta::chunk_bwd
// Launch     grid ceil(B T H K / 8 / THREADS), block THREADS: a thread has 8 neighbouring numbers of each gradient
// FLA        chunk_bwd_dqkwg
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>

namespace fla::gated_delta {

template <class Element>
struct ChunkBwdOutputParams {
    const Element* dq_parts;  // [B, T, HV, K]
    const Element* dk_parts;  // [B, T, HV, K]
    Element* dq;              // [B, T, H, K]
    Element* dk;              // [B, T, H, K]
    i64 len;                  // B T H K
    i32 group;                // HV / H
};

template <class Cfg>
concept ChunkBwdOutputConfig = requires {
    typename Cfg::Element;
    Cfg::K;        // key channels
    Cfg::THREADS;  // of a block
};

// 8 numbers from `at` on of the sum over the rows of a group.
template <ChunkBwdOutputConfig Cfg>
__device__ void sum_group(typename Cfg::Element* to, const typename Cfg::Element* parts, i64 at, i32 group) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, N = 8;
    static_assert(K % N == 0 && sizeof(Element) == 2, "16 bytes of a row");
    const Element* rows = parts + at / K * (i64(group) * K) + at % K;
    float sums[N] = {};
    for (int i = 0; i < group; ++i) {
        const Vec<Element, N> x = load_nc<N>(rows + i64(i) * K);
        #pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += to_f32(x.at[j]);
    }
    Vec<Element, N> out;
    #pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = from_f32<Element>(sums[j]);
    store(to + at, out);
}

template <ChunkBwdOutputConfig Cfg>
__device__ void chunk_bwd_output(const ChunkBwdOutputParams<typename Cfg::Element>& p) {
    const i64 at = (i64(blockIdx.x) * Cfg::THREADS + threadIdx.x) * 8;
    if (at >= p.len) return;
    // (1)
    sum_group<Cfg>(p.dq, p.dq_parts, at, p.group);
    sum_group<Cfg>(p.dk, p.dk_parts, at, p.group);
}

}  // namespace fla::gated_delta
