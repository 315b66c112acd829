// fused_addcmul_bwd: gradients of the mixes, those of the factors as partial sums over the rows of each group.
//
//   d_hidden = sum_i d_out_i        d_delta = sum_i d_out_i * x_i        dx_i = sum over tokens of d_out_i * delta
//
// Reference  fla_reference::rwkv7::addcmul_bwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row, a lane every LANES-th row
// FLA        the backward of fused_addcmul_rwkv7, which writes d_hidden over hidden
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedAddcmulBwdParams {
    const Element* delta;       // [B, T, D]
    const Element* factors[6];  // [D] each, of which MIXES are there
    const Element* d_outs[6];   // [B, T, D] each
    Element* d_hidden;          // [B, T, D]
    Element* d_delta;           // [B, T, D]
    float* partials;            // [groups, MIXES, D]
    Rows rows;
};

template <class Cfg>
concept FusedAddcmulBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
    Cfg::MIXES;   // mixes, 5 or 6
};

template <FusedAddcmulBwdConfig Cfg>
__device__ void fused_addcmul_bwd(const FusedAddcmulBwdParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE, MIXES = Cfg::MIXES;
    const Site site(p.rows);
    Part factors[MIXES];
    #pragma unroll
    for (int i = 0; i < MIXES; ++i) factors[i] = site.load_parameter(p.factors[i]);
    float r_sums[MIXES][SIZE] = {};
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part delta[N], d_outs[N][MIXES];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            delta[n] = site.load(p.delta, first + n * step);
            #pragma unroll
            for (int i = 0; i < MIXES; ++i) {
                d_outs[n][i] = site.load(p.d_outs[i], first + n * step);
            }
        }
        float d_hidden[N][SIZE] = {}, d_delta[N][SIZE] = {};
        #pragma unroll
        for (int i = 0; i < MIXES; ++i) {
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                #pragma unroll
                for (int e = 0; e < SIZE; ++e) {
                    const float d_out = d_outs[n][i][e];
                    d_hidden[n][e] += d_out;
                    d_delta[n][e] = fmaf(d_out, factors[i][e], d_delta[n][e]);
                    r_sums[i][e] = fmaf(d_out, delta[n][e], r_sums[i][e]);
                }
            }
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            site.store(p.d_hidden, first + n * step, d_hidden[n]);
            site.store(p.d_delta, first + n * step, d_delta[n]);
        }
    });
    store_sums(p.partials, site, r_sums);
}

}  // namespace fla::rwkv7
