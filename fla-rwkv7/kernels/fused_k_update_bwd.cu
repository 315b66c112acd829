// fused_k_update_bwd: gradients of the key's update, that of ka as partial sums over the rows of each group.
//
//   dk = d_out * (1 + (a - 1) * ka)        da = d_out * k * ka        dka = sum over tokens of d_out * k * (a - 1)
//
// Reference  fla_reference::rwkv7::k_update_bwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row, a lane every LANES-th row
// FLA        the backward of fused_k_rwkv7
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedKUpdateBwdParams {
    const Element* k;      // [B, T, D]
    const Element* a;      // [B, T, D]  rates
    const Element* ka;     // [D]
    const Element* d_out;  // [B, T, D]
    Element* dk;           // [B, T, D]
    Element* da;           // [B, T, D]
    float* partials;       // [groups, 1, D]
    Rows rows;
};

template <class Cfg>
concept FusedKUpdateBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedKUpdateBwdConfig Cfg>
__device__ void fused_k_update_bwd(const FusedKUpdateBwdParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    const Part ka = site.load_parameter(p.ka);
    float r_sums[1][SIZE] = {};
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part k[N], a[N], d_out[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            k[n] = site.load(p.k, first + n * step);
            a[n] = site.load(p.a, first + n * step);
            d_out[n] = site.load(p.d_out, first + n * step);
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float dk[SIZE], da[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                const float d_out_k = d_out[n][e] * k[n][e];
                dk[e] = d_out[n][e] * key_factor(a[n][e], ka[e]);
                da[e] = d_out_k * ka[e];
                r_sums[0][e] = fmaf(d_out_k, a[n][e] - 1.0f, r_sums[0][e]);
            }
            site.store(p.dk, first + n * step, dk);
            site.store(p.da, first + n * step, da);
        }
    });
    store_sums(p.partials, site, r_sums);
}

}  // namespace fla::rwkv7
