// chunk_state: what a block of a chunk pass works on, and a state or its gradient in the registers of a warp: some
// value channels by all key channels.
#pragma once
#include <fla/core/blocks.cuh>
#include <fla/core/chunk.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>
#include <fla/dplr/chunk_prep.cuh>

namespace fla::dplr {

// What a block works on.
template <class Cfg>
struct ChunkWork {
    i64 i_n, i_h, bos;
    i64 i_saved;  // of the sequence's first chunk; those of the next are p.heads further
    int v0;
    Chunks chunks;

    template <class Params>
    __device__ ChunkWork(const Params& p, u32 i_block) : chunks(0) {
        constexpr int SLICES = ceil_div(Cfg::V, Cfg::BV);
        v0 = i_block % SLICES * Cfg::BV;
        const i64 i_nh = i_block / SLICES;
        i_n = i_nh / p.heads;
        i_h = p.first_h + i_nh % p.heads;
        const Sequence seq = sequence_of(p.cu_seqlens, i_n, p.t);
        bos = seq.bos;
        chunks = Chunks(seq.eos - seq.bos);
        const i64 first_chunk = p.chunk_offsets == nullptr ? i_n * chunks.count : p.chunk_offsets[i_n];
        i_saved = first_chunk * p.heads + i_nh % p.heads;
    }
};

// What the forward pass keeps of a chunk and head; a warp has rows v0 .. v0 + 16.
template <class Cfg>
struct SavedChunk {
    BlockTile<PARTS<Cfg>, ceil_div(Cfg::V, 16) * 16, KP<Cfg>> state;  // S
    BlockTile<PARTS<Cfg>, ceil_div(Cfg::V, 16) * 16, C> u;            // transposed
};

// Rows of a state in the registers of a warp, STATE_ROWS of them.
template <class Cfg>
using StateRows = Acc16[Cfg::STATE_ROWS / 16][KP<Cfg> / 16];

template <class Cfg>
__device__ void zero(StateRows<Cfg>& r) {
    #pragma unroll
    for (int m = 0; m < Cfg::STATE_ROWS / 16; ++m) {
        #pragma unroll
        for (int i = 0; i < KP<Cfg> / 16; ++i) zero(r[m][i]);
    }
}

// r[v, k] *= of[k]
template <class Cfg>
__device__ void scale_state(StateRows<Cfg>& r, const float* s_of) {
    #pragma unroll
    for (int i = 0; i < KP<Cfg> / 16; ++i) {
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 x = *reinterpret_cast<const float2*>(s_of + 16 * i + 8 * n + lane_id() % 4 * 2);
            #pragma unroll
            for (int m = 0; m < Cfg::STATE_ROWS / 16; ++m) {
                #pragma unroll
                for (int e = 0; e < 4; ++e) r[m][i].at[n][e] *= e % 2 == 0 ? x.x : x.y;
            }
        }
    }
}

// Calls f(index, element) for what this lane has of a state [K, V], whose row `v0` of V is the warp's first.
template <class Cfg, class F>
__device__ void for_state(StateRows<Cfg>& r, int v0, F f) {
    #pragma unroll
    for (int m = 0; m < Cfg::STATE_ROWS / 16; ++m) {
        #pragma unroll
        for (int i = 0; i < KP<Cfg> / 16; ++i) {
            for_each(r[m][i], [&](int row, int col, float& x) {
                const int i_v = v0 + 16 * m + row, i_k = 16 * i + col;
                if (i_v < Cfg::V && i_k < Cfg::K) f(i64(i_k) * Cfg::V + i_v, x);
            });
        }
    }
}

// s = rows v0 and on of an image; those past its end become zeros.
template <int THREADS, int P, int ROWS, int COLS, int IMAGE_ROWS>
__device__ void load_image(
    BlockTile<P, ROWS, COLS>& s, const BlockTile<P, IMAGE_ROWS, COLS>& image, int v0, int i_thread
) {
    constexpr int PIECES = ROWS * COLS / 8;  // of 16 bytes, in a part
    #pragma unroll
    for (int p = 0; p < P; ++p) {
        const u32* src = image.blocks[p][v0 / 16][0][0];
        u32* dst = s.blocks[p][0][0][0];
        #pragma unroll
        for (int first = 0; first < PIECES; first += THREADS) {
            const int i = first + i_thread;
            if (PIECES % THREADS != 0 && i >= PIECES) break;
            const bool inside = v0 + i / (2 * COLS) * 16 < IMAGE_ROWS;
            cp_async_cg_16(dst + 4 * i, src + (inside ? 4 * i : 0), inside ? 16 : 0);
        }
    }
}

// What an operand stands for. The zero that it is added to keeps the assembler from unpacking long before the numbers are
// used, for which these kernels have no registers.
template <int P>
__device__ Acc16 unpacked(const FragA<P>& a) {
    Acc16 d;
    zero(d);
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        #pragma unroll
        for (int p = P - 1; p >= 0; --p) {
            const float2 x = unpack2<bf16>(a.at[p][i]);
            d.at[i / 2][i % 2 * 2] += x.x;
            d.at[i / 2][i % 2 * 2 + 1] += x.y;
        }
    }
    return d;
}

// `store_transposed` with an address for each pair of channels, which takes fewer registers beside a state.
template <int CHANNELS, class Element>
__device__ void store_rows(Element* dst, i32 stride, Acc16& d, int col0, int rows) {
    if constexpr (sizeof(Element) == 2 && CHANNELS % 2 == 0) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Block i % 2 of channels and i / 2 of tokens; a lane gets two channels of one token.
            const u32 pair = movmatrix_trans(pack2<Element>(d.at[i / 2][i % 2 * 2], d.at[i / 2][i % 2 * 2 + 1]));
            const int row = i / 2 * 8 + lane_id() / 4, col = col0 + i % 2 * 8 + lane_id() % 4 * 2;
            if (row < rows && col < CHANNELS) *reinterpret_cast<u32*>(dst + row * stride + col) = pair;
        }
    } else if (col0 < CHANNELS) {
        // A slice may have a tile too many.
        store_transposed<CHANNELS>(dst, stride, d, col0, rows);
    }
}

}  // namespace fla::dplr
