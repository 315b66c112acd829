// fused_addcmul: the mixes of a token with its shifted neighbour.
//
//   out_i = hidden + delta * x_i        for MIXES i
//
// Reference  fla_reference::rwkv7::addcmul_fwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row, a lane every LANES-th row
// FLA        fused_addcmul_rwkv7
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedAddcmulParams {
    const Element* hidden;      // [B, T, D]
    const Element* delta;       // [B, T, D]
    const Element* factors[6];  // [D] each, of which MIXES are there
    Element* outs[6];           // [B, T, D] each
    Rows rows;
};

template <class Cfg>
concept FusedAddcmulConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
    Cfg::MIXES;   // mixes, 5 or 6
};

template <FusedAddcmulConfig Cfg>
__device__ void fused_addcmul(const FusedAddcmulParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    const Site site(p.rows);
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part hidden[N], delta[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            hidden[n] = site.load(p.hidden, first + n * step);
            delta[n] = site.load(p.delta, first + n * step);
        }
        #pragma unroll
        for (int i = 0; i < Cfg::MIXES; ++i) {
            // From L1 each time: six factors in registers would cost more than their loads.
            const Part factor = site.load_parameter(p.factors[i]);
            #pragma unroll
            for (int n = 0; n < N; ++n) {
                float out[Site::SIZE];
                #pragma unroll
                for (int e = 0; e < Site::SIZE; ++e) out[e] = mix(hidden[n][e], delta[n][e], factor[e]);
                site.store(p.outs[i], first + n * step, out);
            }
        }
    });
}

}  // namespace fla::rwkv7
