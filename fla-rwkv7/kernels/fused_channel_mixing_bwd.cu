// fused_channel_mixing_bwd: the squared rectifier and its gradient between the matrix products of the backward pass.
//
//   dh = d_out value_weight^T                                (1)  cuBLAS
//   h = relu(z)^2        dz = 2 relu(z) dh                   (2)  this kernel
//   d_value_weight = h^T d_out        d_key_weight = m^T dz  (3)  cuBLAS
//   dm = dz key_weight^T                                     (4)  cuBLAS, then fused_token_shift_addcmul_bwd
//
// Reference  fla_reference::rwkv7::channel_mixing_bwd
// Launch     grid groups * strips, block COLS * LANES: a thread owns one access of a row, a lane every LANES-th row
// FLA        the backward of channel_mixing_rwkv7
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/fused.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

template <class Element>
struct FusedChannelMixingBwdParams {
    const Element* z;   // [B, T, F]  null: it lies in h
    Element* h;         // [B, T, F]
    Element* d_hidden;  // [B, T, F]  dh, and dz in its place
    Rows rows;
};

template <class Cfg>
concept FusedChannelMixingBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // channels of a thread: one access
    Cfg::ELEMS;   // channels of an access at most
    Cfg::COLS;    // threads over a strip of a row
    Cfg::LANES;   // rows of a block side by side
    Cfg::UNROLL;  // rows whose loads are under way together
};

template <FusedChannelMixingBwdConfig Cfg>
__device__ void fused_channel_mixing_bwd(const FusedChannelMixingBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Site = RowSite<Cfg>;
    using Part = typename Site::Part;
    const Site site(p.rows);
    const Element* src = p.z != nullptr ? p.z : p.h;
    for_rows<Cfg>(p.rows, site, [&]<int N>(i64 first, i64 step) {
        Part z[N], dh[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            z[n] = site.load_own(src, first + n * step);
            dh[n] = site.load_own(p.d_hidden, first + n * step);
        }
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            float h[Site::SIZE], dz[Site::SIZE];
            #pragma unroll
            for (int e = 0; e < Site::SIZE; ++e) {
                const float r = relu(z[n][e]);
                h[e] = r * r;
                dz[e] = 2.0f * r * dh[n][e];
            }
            site.store(p.h, first + n * step, h);
            site.store(p.d_hidden, first + n * step, dz);
        }
    });
}

}  // namespace fla::rwkv7
