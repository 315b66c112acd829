// chunk: what the passes by chunks share: factors of decay, what a block works on, and states that kernels leave to others.
//
// With w the log decays of a chunk of 16 tokens, a token i that reads and one j before it that writes, for each channel:
//
//   reads_i  = e^{sum of w before i, from the chunk's start}      writes_j = e^{sum of w after j, to the chunk's end}    (1)
//   end      = e^{sum of w over the chunk}                                                                               (2)
//   pairs    A_ij = scale sum_k r_i k_j e^{sum of w between j and i}    j < i        A_ii = scale sum_k r_i u k_i       (3)
//
// Factors of (1) and (2) are never above 1. That of (3) is reads_i times writes_j / end where no channel of a warp's 16 decays
// by more than e^-PAIR_SPAN in the chunk; otherwise pairs are taken level by level, as `fla/core/decay.cuh` says.
#pragma once
#include <fla/core/blocks.cuh>
#include <fla/core/chunk.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/decay.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>

namespace fla::rwkv6 {

// Parts of an operand that states and their gradients are multiplied with, and of log decays, whose sum must be as good as
// one in f32.
template <class Cfg>
inline constexpr int PARTS = OPERAND_PARTS<typename Cfg::Element>;
template <class Cfg>
inline constexpr int DECAY_PARTS = same<typename Cfg::Element, float> ? 3 : PARTS<Cfg>;

// The decay of a chunk, in nats, up to which a pair's factor may be split at the chunk's start: 1 / end, times anything, is far
// inside of f32.
inline constexpr float PAIR_SPAN = 60.0f;

// Slices of K, of which a block has one: a row of the state decays by itself, and only sums over K join them.
template <class Cfg>
inline constexpr int SLICES_K = ceil_div(Cfg::K, Cfg::BK);
template <class Cfg>
inline constexpr bool IS_SLICED_K = SLICES_K<Cfg> > 1;

// Columns of K in all slices, and of V in tiles; those past K and V are zeros.
template <class Cfg>
inline constexpr int KP = SLICES_K<Cfg> * Cfg::BK;
template <class Cfg>
inline constexpr int VP = ceil_div(Cfg::V, 16) * 16;

// What an output that sums up over K is written as: whole, or as this slice's part.
template <class Cfg>
using OverK = If<IS_SLICED_K<Cfg>, float, typename Cfg::Element>;

// A log decay under this counts as this, and e to it is 0: one that is infinite must not meet the zeros of a sum.
inline constexpr float LEAST_DECAY = -200.0f;

// Log decays of 16 channels as a right operand.
template <class Cfg, class Tile>
__device__ FragB<DECAY_PARTS<Cfg>> load_decay(const Tile& w, int col0) {
    constexpr int P = DECAY_PARTS<Cfg>;
    FragB<P> b;
    if constexpr (P == 1) {
        b = load_b<1>(w, col0);
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32& x = b.at[0][i / 2][i % 2];
            x = max_bf16x2(x, pack2<bf16>(LEAST_DECAY, LEAST_DECAY));
        }
    } else {
        for_pairs_down(w, col0, [&](int i, float2 x) {
            u32 parts[P];
            split_pair<P>(parts, max(x.x, LEAST_DECAY), max(x.y, LEAST_DECAY));
            #pragma unroll
            for (int p = 0; p < P; ++p) b.at[p][i / 2][i % 2] = parts[p];
        });
    }
    return b;
}

// Operands of pairs: these products are few, and what is rounded before them is all the error that there is where decays are
// strong. 16-bit vectors of one part go as tf32, which has 11 bits, others as two bf16, which have 16.
template <class Cfg>
using PairOperand = If<PARTS<Cfg> == 1, Acc16, FragA<2>>;

template <class Cfg>
__device__ PairOperand<Cfg> to_pair(const Acc16& x) {
    if constexpr (PARTS<Cfg> == 1) return round_tf32(x);
    else return to_a<2>(x);
}

// What a pair operand stands for.
__device__ inline Acc16 value(const Acc16& x) { return cut_tf32(x); }
__device__ inline Acc16 value(const FragA<2>& x) { return to_acc(x); }

// The same of what needs no rounding: 16-bit vectors.
template <class Cfg>
__device__ PairOperand<Cfg> to_pair(const FragA<PARTS<Cfg>>& x) {
    if constexpr (PARTS<Cfg> == 1) return to_acc(x);
    else return x;
}

// d += a b^T
__device__ inline void mma_pairs(Acc16& d, const Acc16& a, const Acc16& b) { mma_tf32(d, a, b); }
__device__ inline void mma_pairs(Acc16& d, const FragA<2>& a, const FragA<2>& b) { mma<true>(d, a, to_b_transposed(b)); }

// Which log decays a token sums up. LEVELS + i: of pairs in the halves of blocks of 16 >> i tokens, of which each token
// only reads or only writes.
enum Sum { READS, WRITES, LEVELS, SUMS = LEVELS + 4 };

// As matrices of 0 and 1.
struct DecaySums {
    BlockTile<1, CHUNK, CHUNK> of[SUMS];
};

// All threads of a block call it, before a block barrier.
__device__ inline void init(DecaySums& s) {
    for (int i = threadIdx.x; i < SUMS * CHUNK * CHUNK; i += blockDim.x) {
        const int sum = i / (CHUNK * CHUNK), token = i / CHUNK % CHUNK, of = i % CHUNK;
        const DecaySigns signs(sum < LEVELS ? EXACT : LEVEL + (sum - LEVELS), token, of);
        s.of[sum].set(token, of, (sum != WRITES ? signs.excl : 0) + (sum != READS ? signs.back : 0));
    }
}

// Leaves of a level's scores the pairs that belong to it: [reading, writing] tokens, or the transpose.
template <bool TRANSPOSED>
__device__ void keep_level(Acc16& d, int level) {
    for_each(d, [&](int row, int col, float& x) {
        const bool is_kept = TRANSPOSED ? is_pair(LEVEL + level, col, row, false) : is_pair(LEVEL + level, row, col, false);
        x = is_kept ? x : 0.0f;
    });
}

// Leaves of scores what is below the diagonal, and with it if DIAGONAL; above it for the transpose.
template <bool DIAGONAL, bool TRANSPOSED>
__device__ void keep_below(Acc16& d) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    #pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int col = 2 * t + e;
        const bool is_kept = (TRANSPOSED ? g < col : g > col) || (DIAGONAL && g == col);
        d.at[0][e] = is_kept ? d.at[0][e] : 0.0f;
        d.at[1][2 + e] = is_kept ? d.at[1][2 + e] : 0.0f;
        (TRANSPOSED ? d.at[0][2 + e] : d.at[1][e]) = 0.0f;
    }
}

// A of a chunk, or its transpose: the sum of its parts, of which nothing is left on one side of the diagonal.
template <class Cfg, int THREADS, bool TRANSPOSED>
__device__ void add_parts(AccTile& s_to, const AccTile (&s_parts)[Cfg::BK / 16]) {
    #pragma unroll
    for (int first = 0; first < CHUNK * CHUNK / 2; first += THREADS) {
        const int i = first + threadIdx.x;  // a pair of neighbours
        if (CHUNK * CHUNK / 2 % THREADS != 0 && i >= CHUNK * CHUNK / 2) break;
        float2 sum = {};
        #pragma unroll
        for (int j = 0; j < Cfg::BK / 16; ++j) {
            const float2 part = reinterpret_cast<const float2*>(&s_parts[j])[i];
            sum.x += part.x;
            sum.y += part.y;
        }
        // As `AccTile` has them: of each half of the columns, four numbers of a lane.
        const int lane = i / 2 % 32, row = lane / 4 + i % 2 * 8, col = i / 64 * 8 + lane % 4 * 2;
        reinterpret_cast<float2*>(&s_to)[i] = {
            (TRANSPOSED ? row <= col : row >= col) ? sum.x : 0.0f,
            (TRANSPOSED ? row <= col + 1 : row >= col + 1) ? sum.y : 0.0f};
    }
}

// What a block works on: a segment of a sequence, whole without segments, one head, and BK key and BV value channels.
template <class Cfg>
struct Work {
    i64 i_n, i_h, bos;
    i64 first_chunk;  // of the segment, among all sequences
    i64 i_local;      // of the segment, among the states that segments leave
    int i_segment, segments;
    int k0, v0;
    Chunks chunks;    // of the segment

    template <class Params>
    __device__ explicit Work(const Params& p) : chunks(0) {
        constexpr int SLICES = ceil_div(Cfg::V, Cfg::BV);
        v0 = blockIdx.x % SLICES * Cfg::BV;
        const u32 i_slices = blockIdx.x / SLICES;
        k0 = i_slices % SLICES_K<Cfg> * Cfg::BK;
        const i64 i_block = i_slices / SLICES_K<Cfg>, i_nh = i_block / p.max_segments;
        i_segment = i_block % p.max_segments;
        i_n = i_nh / p.h;
        i_h = i_nh % p.h;
        i_local = i_nh * p.max_segments;
        const Sequence seq = sequence_of(p.cu_seqlens, i_n, p.t);
        const Chunks all(seq.eos - seq.bos);
        segments = max(1, (all.count + p.segment_chunks - 1) / p.segment_chunks);
        const int begin = i_segment * p.segment_chunks;
        bos = seq.bos + i64(begin) * CHUNK;
        first_chunk = (p.chunk_offsets == nullptr ? i_n * all.count : p.chunk_offsets[i_n]) + begin;
        const int count = max(0, min(all.count - begin, p.segment_chunks));
        chunks.count = count;
        chunks.last_rows = begin + count == all.count ? all.last_rows : CHUNK;
    }
    __device__ bool is_nothing() const { return i_segment >= segments; }
    __device__ bool is_last() const { return i_segment + 1 == segments; }
};

// A state or its gradient that segments leave, f32, as lanes hold it: tiles of 16 by 16, of a lane two times four numbers.
template <class Cfg>
inline constexpr i64 LOCAL_STATE = i64(KP<Cfg>) * VP<Cfg>;

__device__ inline void store_local(float* dst, int i_tile, const Acc16& x) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        const Vec<float, 4> half = {x.at[n][0], x.at[n][1], x.at[n][2], x.at[n][3]};
        store(dst + i_tile * 256 + n * 128 + 4 * lane_id(), half);
    }
}

__device__ inline Acc16 load_local(const float* src, int i_tile) {
    Acc16 x;
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        const Vec<float, 4> half = load_nc<4>(src + i_tile * 256 + n * 128 + 4 * lane_id());
        #pragma unroll
        for (int e = 0; e < 4; ++e) x.at[n][e] = half.at[e];
    }
    return x;
}

// Where 16 by 16 numbers of a saved state are: the left operand [K, V] that the backward pass takes, 16 bytes of a lane for
// each part. An image has KP VP numbers for each part.
template <class Cfg>
__device__ int image_tile(int part, int k0, int v0) {
    return ((part * (KP<Cfg> / 16) + k0 / 16) * (VP<Cfg> / 16) + v0 / 16) * 128 + 4 * lane_id();
}
template <class Cfg>
inline constexpr i64 IMAGE_WORDS = i64(PARTS<Cfg>) * KP<Cfg> * VP<Cfg> / 2;

}  // namespace fla::rwkv6
