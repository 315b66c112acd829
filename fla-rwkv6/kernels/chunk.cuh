// chunk: what the passes by chunks share: factors of decay, what a block works on, and states that kernels leave to others.
//
// With w the log decays of a chunk of 16 tokens, a token i that reads and one j before it that writes, for each channel:
//
//   reads_i  = e^{sum of w before i, from the chunk's start}      writes_j = e^{sum of w after j, to the chunk's end}    (1)
//   end      = e^{sum of w over the chunk}                                                                               (2)
//   pairs    A_ij = scale sum_k r_i k_j e^{sum of w between j and i}    j < i        A_ii = scale sum_k r_i u k_i       (3)
//
// Factors of (1) and (2) are never above 1. That of (3) is split in two at the middle of the chunk where all decays are
// moderate, and otherwise level by level, as `fla/core/decay.cuh` says: a warp does so for its own 16 channels.
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

// Parts of the operands of pairs: these products are few, and what is rounded before them is all the error that there is
// where decays are strong.
inline constexpr int PAIR_PARTS = 2;

// Columns of K in shared memory; those past K are zeros.
template <class Cfg>
inline constexpr int KP = ceil_div(Cfg::K, 16) * 16;
template <class Cfg>
inline constexpr int VP = ceil_div(Cfg::V, 16) * 16;

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

// Which log decays a token sums up. LEVELS + i: of pairs in the halves of blocks of 16 >> i tokens, of which each token
// only reads or only writes.
enum Sum { READS, WRITES, CENTRED_READS, CENTRED_WRITES, LEVELS, SUMS = LEVELS + 4 };

// As matrices of -1, 0 and 1.
struct DecaySums {
    BlockTile<1, CHUNK, CHUNK> of[SUMS];
};

// All threads of a block call it, before a block barrier.
__device__ inline void init(DecaySums& s) {
    for (int i = threadIdx.x; i < SUMS * CHUNK * CHUNK; i += blockDim.x) {
        const int sum = i / (CHUNK * CHUNK), token = i / CHUNK % CHUNK, of = i % CHUNK;
        const int mode = sum < CENTRED_READS ? EXACT : sum < LEVELS ? CENTRED : LEVEL + (sum - LEVELS);
        const DecaySigns signs(mode, token, of);
        const bool reads = sum != WRITES && sum != CENTRED_WRITES, writes = sum != READS && sum != CENTRED_READS;
        s.of[sum].set(token, of, (reads ? signs.excl : 0) + (writes ? signs.back : 0));
    }
}

// Calls f(mode) for the modes that pairs of 16 channels are taken in. A loop, as the code of one is long enough.
template <class F>
__device__ void for_pair_modes(bool is_wide, F f) {
    #pragma unroll 1
    for (int mode = is_wide ? LEVEL : CENTRED; mode < DIAGONAL; ++mode) {
        f(mode);
        if (mode == CENTRED) break;
    }
}

// The sum of log decays of pairs of this mode, for tokens that read, and whether those that write have their own.
__device__ inline int pair_sum(int mode) { return mode == CENTRED ? int(CENTRED_READS) : LEVELS + (mode - LEVEL); }

// What a block works on: a segment of a sequence, whole without segments, one head, and BV value channels.
template <class Cfg>
struct Work {
    i64 i_n, i_h, bos;
    i64 first_chunk;  // of the segment, among all sequences
    i64 i_local;      // of the segment, among the states that segments leave
    int i_segment, segments;
    int v0;
    Chunks chunks;    // of the segment

    template <class Params>
    __device__ explicit Work(const Params& p) : chunks(0) {
        constexpr int SLICES = ceil_div(Cfg::V, Cfg::BV);
        v0 = blockIdx.x % SLICES * Cfg::BV;
        const i64 i_block = blockIdx.x / SLICES, i_nh = i_block / p.max_segments;
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
