// fused_token_shift_bwd: gradients of the difference to the token before.
//
//   dx_t = dy_{t+1} - dy_t, with d_cache_out in place of dy_{t+1} at the last token        d_cache = dy_0
//
// Reference  fla_reference::token_shift::bwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row and walks over rows in time
// FLA        the backward of token_shift
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/rows.cuh>
#include <fla/rwkv7/shift.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedTokenShiftBwdParams {
    const Element* dy;           // [B, T, D]
    const Element* d_cache_out;  // [N, D]  null: zero
    Element* dx;                 // [B, T, D]
    Element* d_cache;            // [N, D]  null: not wanted
    Sequences seqs;
    Rows rows;
};

template <class Cfg>
concept FusedTokenShiftBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // runs of rows of a block
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedTokenShiftBwdConfig Cfg>
__device__ void fused_token_shift_bwd(const FusedTokenShiftBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    for_runs(p.rows, site, [&](const Run& run) {
        Cursor cursor(p.seqs, run.begin);
        ShiftGradient<Site, Element> gradient{site, run, p.d_cache_out, p.dx, p.d_cache};
        const float direct[SIZE] = {};  // x_t reaches y through differences only
        unrolled_rows<Cfg::UNROLL>(run.begin, run.end, 1, [&]<int N>(i64 first, i64) {
            Part dy[N];
            #pragma unroll
            for (int n = 0; n < N; ++n) dy[n] = site.load(p.dy, first + n);
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                cursor.advance_to(p.seqs, first + n);
                float d_delta[SIZE];
                #pragma unroll
                for (int e = 0; e < SIZE; ++e) d_delta[e] = dy[n][e];
                gradient.add(cursor, first + n, direct, d_delta);
            }
        });
        if (run.end < cursor.eos) {
            const Part dy = site.load(p.dy, run.end);
            float d_delta[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) d_delta[e] = dy[e];
            gradient.complete(run.end - 1, d_delta);
        }
    });
    store_empty(site, p.seqs, p.d_cache_out, p.d_cache);
}

}  // namespace fla::rwkv7
