// fused_gate_output_correction_bwd: gradients of the bonus and the output gate, that of r_k as partial sums over the
// rows of each group.
//
//   s = sum_k r k r_k        d_o = d_out * g        ds = sum_k d_o v
//   dv = s d_o        dg = d_out * (o + s v)        dr = ds k * r_k        dk = ds r * r_k
//   dr_k = sum over tokens of ds r * k
//
// Reference  fla_reference::rwkv7::gate_output_correction_bwd
// Launch     grid groups * strips, block COLS * LANES: up to 32 threads own a head, a lane every LANES-th row
// FLA        the backward of gate_output_correction
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedGateOutputCorrectionBwdParams {
    const Element* o;      // [B, T, H, K]
    const Element* r;      // [B, T, H, K]
    const Element* k;      // [B, T, H, K]
    const Element* r_k;    // [H, K]
    const Element* v;      // [B, T, H, K]
    const Element* g;      // [B, T, H, K]  the output gate
    const Element* d_out;  // [B, T, H, K]
    Element* d_o;          // [B, T, H, K]
    Element* dr;           // [B, T, H, K]
    Element* dk;           // [B, T, H, K]
    Element* dv;           // [B, T, H, K]
    Element* dg;           // [B, T, H, K]
    float* partials;       // [groups, 1, H, K]
    Rows rows;
};

template <class Cfg>
concept FusedGateOutputCorrectionBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a head
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedGateOutputCorrectionBwdConfig Cfg>
__device__ void fused_gate_output_correction_bwd(
    const FusedGateOutputCorrectionBwdParams<typename Cfg::Element>& p
) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    const Part r_k = site.load_parameter(p.r_k);
    float r_sums[1][SIZE] = {};
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part r[N], k[N], v[N], o[N], g[N], d_out[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            const i64 row = first + n * step;
            r[n] = site.load(p.r, row);
            k[n] = site.load(p.k, row);
            v[n] = site.load(p.v, row);
            o[n] = site.load(p.o, row);
            g[n] = site.load(p.g, row);
            d_out[n] = site.load(p.d_out, row);
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            const i64 row = first + n * step;
            float bonus = 0.0f, d_bonus = 0.0f, d_o[SIZE], y[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                bonus = fmaf(r[n][e] * k[n][e], r_k[e], bonus);
                d_o[e] = d_out[n][e] * g[n][e];
                d_bonus = fmaf(d_o[e], v[n][e], d_bonus);
            }
            bonus = group_sum<Part::LANES_K>(bonus);
            d_bonus = group_sum<Part::LANES_K>(d_bonus);
            site.store(p.d_o, row, d_o);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) y[e] = bonus * d_o[e];
            site.store(p.dv, row, y);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) y[e] = d_out[n][e] * fmaf(bonus, v[n][e], o[n][e]);
            site.store(p.dg, row, y);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) y[e] = d_bonus * k[n][e] * r_k[e];
            site.store(p.dr, row, y);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                const float d_bonus_r = d_bonus * r[n][e];
                y[e] = d_bonus_r * r_k[e];
                r_sums[0][e] = fmaf(d_bonus_r, k[n][e], r_sums[0][e]);
            }
            site.store(p.dk, row, y);
        }
    });
    store_sums(p.partials, site, r_sums);
}

}  // namespace fla::rwkv7
