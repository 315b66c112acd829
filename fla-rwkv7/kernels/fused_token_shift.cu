// fused_token_shift: the difference of each token to the one before it, and the last token of each sequence.
//
//   y_t = x_{t-1} - x_t        x_{-1} = cache        cache_out = x of the last token
//
// Reference  fla_reference::token_shift::fwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row and walks over rows in time
// FLA        token_shift
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/rows.cuh>
#include <fla/rwkv7/shift.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedTokenShiftParams {
    const Element* x;      // [B, T, D]
    const Element* cache;  // [N, D]  null: zero
    Element* y;            // [B, T, D]
    Element* cache_out;    // [N, D]  null: not wanted
    Sequences seqs;
    Rows rows;
};

template <class Cfg>
concept FusedTokenShiftConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // runs of rows of a block
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedTokenShiftConfig Cfg>
__device__ void fused_token_shift(const FusedTokenShiftParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    const Site site(p.rows);
    const auto subtract_rows = [&]<int N>(i64 first, const Part (&x)[N], const Part (&previous)[N]) {
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float y[Site::SIZE];
            #pragma unroll
            for (int e = 0; e < Site::SIZE; ++e) y[e] = previous[n][e] - x[n][e];
            site.store(p.y, first + n, y);
        }
    };
    for_runs(p.rows, site, [&](const Run& run) {
        walk_shifted<Cfg::UNROLL>(site, p.seqs, run, p.x, p.cache, subtract_rows);
    });
    store_last(site, p.seqs, p.x, p.cache, p.cache_out);
}

}  // namespace fla::rwkv7
