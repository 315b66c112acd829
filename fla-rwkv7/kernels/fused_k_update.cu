// fused_k_update: the key after its rate.
//
//   out = k * (1 + (a - 1) * ka)
//
// Reference  fla_reference::rwkv7::k_update_fwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row, a lane every LANES-th row
// FLA        fused_k_rwkv7
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedKUpdateParams {
    const Element* k;   // [B, T, D]
    const Element* a;   // [B, T, D]  rates
    const Element* ka;  // [D]
    Element* out;       // [B, T, D]
    Rows rows;
};

template <class Cfg>
concept FusedKUpdateConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedKUpdateConfig Cfg>
__device__ void fused_k_update(const FusedKUpdateParams<typename Cfg::Element>& p) {
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    const Site site(p.rows);
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
            float out[Site::SIZE];
            #pragma unroll
            for (int e = 0; e < Site::SIZE; ++e) out[e] = k[n][e] * key_factor(a[n][e], ka[e]);
            site.store(p.out, first + n * step, out);
        }
    });
}

}  // namespace fla::rwkv7
