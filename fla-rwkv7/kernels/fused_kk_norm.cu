// fused_kk_norm: the key of unit length of each head.
//
//   kk = x / sqrt(sum x^2 + 1e-6)        x = k * k_k
//
// Reference  fla_reference::rwkv7::kk_norm_fwd
// Launch     grid groups * strips, block COLS * LANES: up to 32 threads own a head, a lane every LANES-th row
// FLA        l2norm of k * k_k
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedKkNormParams {
    const Element* k;    // [B, T, H, K]
    const Element* k_k;  // [H, K]
    Element* kk;         // [B, T, H, K]
    Rows rows;
};

template <class Cfg>
concept FusedKkNormConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a head
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedKkNormConfig Cfg>
__device__ void fused_kk_norm(const FusedKkNormParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    constexpr int SIZE = Site::SIZE;
    const Site site(p.rows);
    const Part k_k = site.load_parameter(p.k_k);
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part k[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) k[n] = site.load(p.k, first + n * step);
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float kk[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) kk[e] = k[n][e] * k_k[e];
            const float inverse = inverse_norm<Part::LANES_K>(kk);
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) kk[e] *= inverse;
            site.store(p.kk, first + n * step, kk);
        }
    });
}

}  // namespace fla::rwkv7
