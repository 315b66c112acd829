// fused_kk_norm_k_update_bwd: gradients of the unit key and the updated key in one pass, those of the parameters as
// partial sums over the rows of each group.
//
//   g  = d_kk - d_neg_kk + d_b * a        dx = (g - kk (kk . g)) / sqrt(sum x^2 + 1e-6)        x = k * k_k
//   dk = dx * k_k + d_k_updated * (1 + (a - 1) * ka)        da = d_b * kk + d_k_updated * k * ka
//   dk_k = sum over tokens of dx * k        dka = sum over tokens of d_k_updated * k * (a - 1)
//
// Reference  fla_reference::rwkv7::kk_norm_k_update_bwd
// Launch     grid groups * strips, block COLS * LANES: up to 32 threads own a head, a lane every LANES-th row
// FLA        the backward of l2norm, fused_k_rwkv7 and two products
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedKkNormKUpdateBwdParams {
    const Element* k;            // [B, T, H, K]
    const Element* a;            // [B, T, H, K]  rates
    const Element* k_k;          // [H, K]
    const Element* ka;           // [H, K]
    const Element* d_k_updated;  // [B, T, H, K]
    const Element* d_kk;         // [B, T, H, K]  null: zero
    const Element* d_neg_kk;     // [B, T, H, K]  null: zero
    const Element* d_b;          // [B, T, H, K]  null: zero
    Element* dk;                 // [B, T, H, K]
    Element* da;                 // [B, T, H, K]
    float* partials;             // [groups, 2, H, K]  of k_k, then of ka
    Rows rows;
};

template <class Cfg>
concept FusedKkNormKUpdateBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a head
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedKkNormKUpdateBwdConfig Cfg>
__device__ void fused_kk_norm_k_update_bwd(const FusedKkNormKUpdateBwdParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    const Part k_k = site.load_parameter(p.k_k);
    const Part ka = site.load_parameter(p.ka);
    float r_sums[2][SIZE] = {};
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part k[N], a[N], d_k_updated[N], d_kk[N], d_neg_kk[N], d_b[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            const i64 row = first + n * step;
            k[n] = site.load(p.k, row);
            a[n] = site.load(p.a, row);
            d_k_updated[n] = site.load(p.d_k_updated, row);
            d_kk[n] = d_neg_kk[n] = d_b[n] = {};
            if (p.d_kk != nullptr) d_kk[n] = site.load(p.d_kk, row);
            if (p.d_neg_kk != nullptr) d_neg_kk[n] = site.load(p.d_neg_kk, row);
            if (p.d_b != nullptr) d_b[n] = site.load(p.d_b, row);
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            const i64 row = first + n * step;
            float x[SIZE], g[SIZE], dx[SIZE], dk[SIZE], da[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                x[e] = k[n][e] * k_k[e];
                g[e] = fmaf(d_b[n][e], a[n][e], d_kk[n][e] - d_neg_kk[n][e]);
            }
            const float inverse = inverse_norm<Part::LANES_K>(x);
            inverse_norm_bwd<Part::LANES_K>(dx, x, g, inverse);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                const float d_k = d_k_updated[n][e], d_k_k = d_k * k[n][e];
                dk[e] = fmaf(dx[e], k_k[e], d_k * key_factor(a[n][e], ka[e]));
                da[e] = fmaf(d_b[n][e], x[e] * inverse, d_k_k * ka[e]);
                r_sums[0][e] = fmaf(dx[e], k[n][e], r_sums[0][e]);
                r_sums[1][e] = fmaf(d_k_k, a[n][e] - 1.0f, r_sums[1][e]);
            }
            site.store(p.dk, row, dk);
            site.store(p.da, row, da);
        }
    });
    store_sums(p.partials, site, r_sums);
}

}  // namespace fla::rwkv7
