// fused_kk_norm_bwd: gradients of the key of unit length, that of k_k as partial sums over the rows of each group.
//
//   dx = (d_kk - kk (kk . d_kk)) / sqrt(sum x^2 + 1e-6)        x = k * k_k
//   dk = dx * k_k        dk_k = sum over tokens of dx * k
//
// Reference  fla_reference::rwkv7::kk_norm_bwd
// Launch     grid groups * strips, block COLS * LANES: up to 32 threads own a head, a lane every LANES-th row
// FLA        the backward of l2norm of k * k_k
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedKkNormBwdParams {
    const Element* k;     // [B, T, H, K]
    const Element* k_k;   // [H, K]
    const Element* d_kk;  // [B, T, H, K]
    Element* dk;          // [B, T, H, K]
    float* partials;      // [groups, 1, H, K]
    Rows rows;
};

template <class Cfg>
concept FusedKkNormBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a head
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedKkNormBwdConfig Cfg>
__device__ void fused_kk_norm_bwd(const FusedKkNormBwdParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    const Part k_k = site.load_parameter(p.k_k);
    float r_sums[1][SIZE] = {};
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part k[N], d_kk[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            k[n] = site.load(p.k, first + n * step);
            d_kk[n] = site.load(p.d_kk, first + n * step);
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float x[SIZE], dy[SIZE], dx[SIZE], dk[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                x[e] = k[n][e] * k_k[e];
                dy[e] = d_kk[n][e];
            }
            inverse_norm_bwd<Part::LANES_K>(dx, x, dy, inverse_norm<Part::LANES_K>(x));
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                dk[e] = dx[e] * k_k[e];
                r_sums[0][e] = fmaf(dx[e], k[n][e], r_sums[0][e]);
            }
            site.store(p.dk, first + n * step, dk);
        }
    });
    store_sums(p.partials, site, r_sums);
}

}  // namespace fla::rwkv7
