// fused_token_shift_addcmul_bwd: gradients of the mixes with the token before, those of the factors as partial sums over
// the rows of each group.
//
//   direct = sum_i d_out_i        d_delta = sum_i d_out_i * x_i        dx_i = sum over tokens of d_out_i (x_{t-1} - x_t)
//   dx_t = direct_t - d_delta_t + d_delta_{t+1}, with d_cache_out in place of d_delta_{t+1} at the last token
//   d_cache = d_delta of the first token
//
// Reference  fla_reference::rwkv7::token_shift_addcmul_bwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row and walks over rows in time
// FLA        the backward of fused_addcmul_rwkv7 and of token_shift
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/rows.cuh>
#include <fla/rwkv7/shift.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedTokenShiftAddcmulBwdParams {
    const Element* x;            // [B, T, D]
    const Element* cache;        // [N, D]  null: zero
    const Element* factors[6];   // [D] each, of which MIXES are there
    const Element* d_outs[6];    // [B, T, D] each
    const Element* d_cache_out;  // [N, D]  null: zero
    Element* dx;                 // [B, T, D]
    Element* d_cache;            // [N, D]  null: not wanted
    float* partials;             // [groups, MIXES, D]
    Sequences seqs;
    Rows rows;
};

template <class Cfg>
concept FusedTokenShiftAddcmulBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // runs of rows of a block
    Cfg::UNROLL;  // rows whose loads are under way together
    Cfg::MIXES;   // mixes, 1 to 6
};

template <FusedTokenShiftAddcmulBwdConfig Cfg>
__device__ void fused_token_shift_addcmul_bwd(const FusedTokenShiftAddcmulBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE, MIXES = Cfg::MIXES;
    const Site site(p.rows);
    Part factors[MIXES];
    #pragma unroll
    for (int i = 0; i < MIXES; ++i) factors[i] = site.load_parameter(p.factors[i]);
    float r_sums[MIXES][SIZE] = {};
    for_runs(p.rows, site, [&](const Run& run) {
        Cursor cursor(p.seqs, run.begin);
        ShiftGradient<Site, Element> gradient{site, run, p.d_cache_out, p.dx, p.d_cache};
        Part previous = {};
        if (cursor.bos < run.begin) previous = site.load(p.x, run.begin - 1);
        unrolled_rows<Cfg::UNROLL>(run.begin, run.end, 1, [&]<int N>(i64 first, i64) {
            Part x[N], d_outs[N][MIXES];
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                x[n] = site.load(p.x, first + n);
                #pragma unroll
                for (int i = 0; i < MIXES; ++i) d_outs[n][i] = site.load(p.d_outs[i], first + n);
            }
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                cursor.advance_to(p.seqs, first + n);
                if (first + n == cursor.bos) {
                    previous = {};
                    if (p.cache != nullptr) previous = site.load(p.cache, cursor.i_n);
                }
                float direct[SIZE] = {}, d_delta[SIZE] = {};
                #pragma unroll
                for (int i = 0; i < MIXES; ++i) {
                            #pragma unroll
                    for (int e = 0; e < SIZE; ++e) {
                        const float d_out = d_outs[n][i][e];
                        direct[e] += d_out;
                        d_delta[e] = fmaf(d_out, factors[i][e], d_delta[e]);
                        r_sums[i][e] = fmaf(d_out, previous[e] - x[n][e], r_sums[i][e]);
                    }
                }
                previous = x[n];
                gradient.add(cursor, first + n, direct, d_delta);
            }
        });
        if (run.end < cursor.eos) {
            float d_delta[SIZE] = {};
            #pragma unroll
            for (int i = 0; i < MIXES; ++i) {
                    const Part d_out = site.load(p.d_outs[i], run.end);
                #pragma unroll
                for (int e = 0; e < SIZE; ++e) d_delta[e] = fmaf(d_out[e], factors[i][e], d_delta[e]);
            }
            gradient.complete(run.end - 1, d_delta);
        }
    });
    store_empty(site, p.seqs, p.d_cache_out, p.d_cache);
    store_sums(p.partials, site, r_sums);
}

}  // namespace fla::rwkv7
