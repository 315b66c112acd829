// fused_token_shift_addcmul: the mixes of each token with the one before it, from one read of the tokens.
//
//   out_i = x_t + (x_{t-1} - x_t) * x_i        for MIXES i        x_{-1} = cache        cache_out = x of the last token
//
// Reference  fla_reference::rwkv7::token_shift_addcmul_fwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row and walks over rows in time
// FLA        token_shift and fused_addcmul_rwkv7
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>
#include <fla/rwkv7/shift.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedTokenShiftAddcmulParams {
    const Element* x;           // [B, T, D]
    const Element* cache;       // [N, D]  null: zero
    const Element* factors[6];  // [D] each, of which MIXES are there
    Element* outs[6];           // [B, T, D] each
    Element* cache_out;         // [N, D]  null: not wanted
    Sequences seqs;
    Rows rows;
};

template <class Cfg>
concept FusedTokenShiftAddcmulConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // runs of rows of a block
    Cfg::UNROLL;  // rows whose loads are under way together
    Cfg::MIXES;   // mixes, 1 to 6
};

template <FusedTokenShiftAddcmulConfig Cfg>
__device__ void fused_token_shift_addcmul(const FusedTokenShiftAddcmulParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    const Site site(p.rows);
    const auto mix_rows = [&]<int N>(i64 first, const Part (&x)[N], const Part (&previous)[N]) {
        #pragma unroll
        for (int i = 0; i < Cfg::MIXES; ++i) {
            // From L1 each time: six factors in registers would cost more than their loads.
            const Part factor = site.load_parameter(p.factors[i]);
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                float out[Site::SIZE];
                #pragma unroll
                for (int e = 0; e < Site::SIZE; ++e) out[e] = mix(x[n][e], previous[n][e] - x[n][e], factor[e]);
                site.store(p.outs[i], first + n, out);
            }
        }
    };
    for_runs(p.rows, site, [&](const Run& run) {
        walk_shifted<Cfg::UNROLL>(site, p.seqs, run, p.x, p.cache, mix_rows);
    });
    store_last(site, p.seqs, p.x, p.cache, p.cache_out);
}

}  // namespace fla::rwkv7
