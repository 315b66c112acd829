// fused_gate_output_correction: the bonus of the current token and the output gate.
//
//   s = sum_k r k r_k        out = (o + s v) * g
//
// Reference  fla_reference::rwkv7::gate_output_correction_fwd
// Launch     grid groups * strips, block COLS * LANES: up to 32 threads own a head, a lane every LANES-th row
// FLA        gate_output_correction
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedGateOutputCorrectionParams {
    const Element* o;    // [B, T, H, K]
    const Element* r;    // [B, T, H, K]
    const Element* k;    // [B, T, H, K]
    const Element* r_k;  // [H, K]
    const Element* v;    // [B, T, H, K]
    const Element* g;    // [B, T, H, K]  the output gate
    Element* out;        // [B, T, H, K]
    Rows rows;
};

template <class Cfg>
concept FusedGateOutputCorrectionConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a head
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedGateOutputCorrectionConfig Cfg>
__device__ void fused_gate_output_correction(const FusedGateOutputCorrectionParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    const Part r_k = site.load_parameter(p.r_k);
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part r[N], k[N], v[N], o[N], g[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            const i64 row = first + n * step;
            r[n] = site.load(p.r, row);
            k[n] = site.load(p.k, row);
            v[n] = site.load(p.v, row);
            o[n] = site.load(p.o, row);
            g[n] = site.load(p.g, row);
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float bonus = 0.0f, out[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) bonus = fmaf(r[n][e] * k[n][e], r_k[e], bonus);
            bonus = group_sum<Part::LANES_K>(bonus);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) out[e] = fmaf(bonus, v[n][e], o[n][e]) * g[n][e];
            site.store(p.out, first + n * step, out);
        }
    });
}

}  // namespace fla::rwkv7
