// fused_channel_mixing: the squared rectifier between the two matrix products of channel mixing.
//
//   m = x_t + (x_{t-1} - x_t) * x_k        z = m key_weight        (1)  fused_token_shift_addcmul and cuBLAS
//   h = relu(z)^2                                                  (2)  this kernel
//   out = h value_weight                                           (3)  cuBLAS
//
// Reference  fla_reference::rwkv7::channel_mixing_fwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row, a lane every LANES-th row
// FLA        channel_mixing_rwkv7
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedChannelMixingParams {
    const Element* z;  // [B, T, F]  null: it lies in h
    Element* h;        // [B, T, F]
    Rows rows;
};

template <class Cfg>
concept FusedChannelMixingConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedChannelMixingConfig Cfg>
__device__ void fused_channel_mixing(const FusedChannelMixingParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    const Site site(p.rows);
    const Element* src = p.z != nullptr ? p.z : p.h;
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part z[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) z[n] = site.load_own(src, first + n * step);
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float h[Site::SIZE];
            #pragma unroll
            for (int e = 0; e < Site::SIZE; ++e) h[e] = relu(z[n][e]) * relu(z[n][e]);
            site.store(p.h, first + n * step, h);
        }
    });
}

}  // namespace fla::rwkv7
