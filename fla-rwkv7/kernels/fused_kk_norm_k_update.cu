// fused_kk_norm_k_update: everything that the transition of the state needs of a key, from one read of it.
//
//   kk = x / sqrt(sum x^2 + 1e-6)        x = k * k_k
//   k_updated = k * (1 + (a - 1) * ka)        neg_kk = -kk        b = kk * a
//
// Reference  fla_reference::rwkv7::kk_norm_k_update_fwd
// Launch     grid groups * strips, block COLS * LANES: up to 32 threads own a head, a lane every LANES-th row
// FLA        l2norm, fused_k_rwkv7 and two products
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedKkNormKUpdateParams {
    const Element* k;    // [B, T, H, K]
    const Element* a;    // [B, T, H, K]  rates
    const Element* k_k;  // [H, K]
    const Element* ka;   // [H, K]
    Element* k_updated;  // [B, T, H, K]
    Element* kk;         // [B, T, H, K]  null: not wanted
    Element* neg_kk;     // [B, T, H, K]  null: not wanted
    Element* b;          // [B, T, H, K]  null: not wanted
    Rows rows;
};

template <class Cfg>
concept FusedKkNormKUpdateConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a head
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedKkNormKUpdateConfig Cfg>
__device__ void fused_kk_norm_k_update(const FusedKkNormKUpdateParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    const Part k_k = site.load_parameter(p.k_k);
    const Part ka = site.load_parameter(p.ka);
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part k[N], a[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            k[n] = site.load(p.k, first + n * step);
            a[n] = site.load(p.a, first + n * step);
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            const i64 row = first + n * step;
            float kk[SIZE], y[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) kk[e] = k[n][e] * k_k[e];
            const float inverse = inverse_norm<Part::LANES_K>(kk);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                kk[e] *= inverse;
                y[e] = k[n][e] * key_factor(a[n][e], ka[e]);
            }
            site.store(p.k_updated, row, y);
            if (p.kk != nullptr) site.store(p.kk, row, kk);
            if (p.neg_kk != nullptr) {
                #pragma unroll
                for (int e = 0; e < SIZE; ++e) y[e] = -kk[e];
                site.store(p.neg_kk, row, y);
            }
            if (p.b != nullptr) {
                #pragma unroll
                for (int e = 0; e < SIZE; ++e) y[e] = kk[e] * a[n][e];
                site.store(p.b, row, y);
            }
        }
    });
}

}  // namespace fla::rwkv7
