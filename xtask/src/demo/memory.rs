//! A text as an associative memory sees it: what was read last is the key, what comes next is the value.

/// Key channels of a head.
pub(super) const K: usize = 64;
/// Value channels of a head.
pub(super) const V: usize = 64;

/// One head: how much it looks back, and how firmly it writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    /// How many of the last bytes make the key; without any, the key is always the same.
    pub(super) context: usize,
    /// Write strength. A short context is followed by many different bytes, so its head averages over many
    /// occurrences; a long one is followed by the same byte most of the time, so its head trusts the last ones.
    /// Powers of two, so that every input of an operator is exact in bf16.
    pub(super) strength: f32,
}

/// The heads of the operators with a matrix state.
pub(super) const HEADS: &[Head] = &[
    Head { context: 0, strength: 1.0 / 256.0 },
    Head { context: 1, strength: 1.0 / 32.0 },
    Head { context: 2, strength: 1.0 / 16.0 },
    Head { context: 3, strength: 1.0 / 8.0 },
    Head { context: 4, strength: 1.0 / 4.0 },
    Head { context: 6, strength: 1.0 / 2.0 },
];

/// Bytes before a piece of text that its keys depend on.
pub(super) const MAX_CONTEXT: usize = 6;

/// Groups of a code.
const GROUPS: usize = 4;
/// Components of a group.
const WIDTH: usize = V / GROUPS;

/// Share of a group below which its component is noise of the memory rather than evidence.
const NOISE: f32 = 1.0 / 64.0;

/// A code for each byte: in each of four groups of sixteen components, one is 1/2 and the others are 0.
///
/// Which one is a digit of a Reed-Solomon code over the field of 16 elements: with `h` and `l` the halves of the byte,
/// `h`, `l`, `h + l` and `h + x l`. Two bytes agree in one digit at most, so an average of codes, which is what a memory
/// returns, can be taken apart: a byte stands out when all four of its digits do.
pub(super) struct Codes {
    places: Vec<[usize; GROUPS]>,
}

impl Codes {
    /// The codes.
    pub(super) fn new() -> Codes {
        let places = (0..256usize).map(|byte| {
            let (h, l) = (byte / WIDTH, byte % WIDTH);
            // The field is that of polynomials over two elements, modulo x^4 + x + 1.
            let shifted = l << 1;
            let xl = if shifted & 0b10000 == 0 { shifted } else { shifted ^ 0b10011 };
            let digits = [h, l, h ^ l, h ^ xl];
            std::array::from_fn(|group| group * WIDTH + digits[group])
        });
        Codes { places: places.collect() }
    }

    /// The code of a byte, `[V]`, of unit length.
    pub(super) fn code(&self, byte: u8) -> [f32; V] {
        let mut code = [0.0; V];
        for &place in &self.places[usize::from(byte)] {
            code[place] = 0.5;
        }
        code
    }

    /// How much `o`, `[V]`, speaks for each byte: the mean of `ln(1 + share / NOISE)` over its four digits, where the
    /// share of a digit is twice its component, and 0 when that is negative.
    pub(super) fn evidence(&self, o: &[f32]) -> [f32; 256] {
        let mut of_digit = [0.0; V];
        for (of_digit, x) in of_digit.iter_mut().zip(o) {
            *of_digit = (1.0 + 2.0 * x.max(0.0) / NOISE).ln() / GROUPS as f32;
        }
        std::array::from_fn(|byte| self.places[byte].iter().map(|&place| of_digit[place]).sum())
    }
}

/// A piece of the text, as tensors.
pub(super) struct Segment<'a> {
    /// The bytes.
    pub(super) bytes: &'a [u8],
    /// `[T + 1, H, K]`  the key of what precedes each byte, and of what precedes the byte after the last.
    keys: Vec<f32>,
    /// `[T, H, V]`  the code of each byte, the same for every head.
    pub(super) values: Vec<f32>,
    /// `[T, H, V]`  the same times the write strength of the head.
    pub(super) weighted_values: Vec<f32>,
    /// `[T + 1]`  the last bytes before each byte, most recent first; 256 before the start of the text.
    contexts: Vec<[u16; MAX_CONTEXT]>,
}

impl<'a> Segment<'a> {
    /// The segment `bytes` of a text in which `before` comes first.
    pub(super) fn new(codes: &Codes, before: &[u8], bytes: &'a [u8]) -> Segment<'a> {
        let t = bytes.len();
        let contexts: Vec<[u16; MAX_CONTEXT]> = (0..=t)
            .map(|i_t| {
                let recent = bytes[..i_t].iter().rev().chain(before.iter().rev());
                let mut context = [256; MAX_CONTEXT];
                for (place, byte) in context.iter_mut().zip(recent) {
                    *place = u16::from(*byte);
                }
                context
            })
            .collect();
        let mut keys = Vec::with_capacity((t + 1) * HEADS.len() * K);
        for context in &contexts {
            for head in HEADS {
                keys.extend(key(&context[..head.context]));
            }
        }
        let mut values = Vec::with_capacity(t * HEADS.len() * V);
        let mut weighted_values = Vec::with_capacity(values.capacity());
        for &byte in bytes {
            let code = codes.code(byte);
            for head in HEADS {
                values.extend(code);
                weighted_values.extend(code.map(|x| x * head.strength));
            }
        }
        Segment { bytes, keys, values, weighted_values, contexts }
    }

    /// Number of bytes (T).
    pub(super) fn t(&self) -> usize {
        self.bytes.len()
    }

    /// `[T, H, K]`  the key under which each byte is written, and with which it is predicted.
    pub(super) fn keys(&self) -> &[f32] {
        &self.keys[..self.t() * HEADS.len() * K]
    }

    /// `[T, H, K]`  the key that predicts the byte after each, known once that one is.
    pub(super) fn next_keys(&self) -> &[f32] {
        &self.keys[HEADS.len() * K..]
    }

    /// The `n` bytes before byte `i_t`, most recent first; `i_t` may be T, the byte after the last.
    pub(super) fn context(&self, i_t: usize, n: usize) -> &[u16] {
        &self.contexts[i_t][..n]
    }
}

/// A unit vector from the hash of a context: bit i is the sign of component i.
pub(super) fn key(context: &[u16]) -> [f32; K] {
    let bits = hash(context);
    // 64 components of 1/8: the length is exactly 1.
    std::array::from_fn(|i| if bits >> i & 1 == 0 { 0.125 } else { -0.125 })
}

/// A hash of a context in which every bit depends on every byte and on the length.
pub(super) fn hash(context: &[u16]) -> u64 {
    let start = scramble(context.len() as u64);
    context.iter().fold(start, |hash, &byte| scramble(hash ^ u64::from(byte)))
}

/// The finaliser of SplitMix64, with its increment.
fn scramble(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(x: &[f32], y: &[f32]) -> f32 {
        x.iter().zip(y).map(|(x, y)| x * y).sum()
    }

    #[test]
    fn keys_have_unit_length_and_differ() {
        for context in [&[][..], &[0], &[255], &[104, 101], &[256, 256], &[104, 101, 108, 108, 111, 32]] {
            let x = key(context);
            assert_eq!(product(&x, &x), 1.0);
        }
        let near = product(&key(&[97, 98]), &key(&[98, 97])).abs();
        assert!(near < 0.6, "{near}");
        assert_ne!(key(&[97]), key(&[97, 97]));
    }

    #[test]
    fn codes_have_unit_length_and_decode_to_their_byte() {
        let codes = Codes::new();
        for byte in 0..=255u8 {
            let code = codes.code(byte);
            assert_eq!(product(&code, &code), 1.0);
            let evidence = codes.evidence(&code);
            for other in 0..=255u8 {
                if other != byte {
                    assert!(product(&code, &codes.code(other)) <= 0.25, "{byte} and {other}");
                    let (own, its) = (evidence[usize::from(byte)], evidence[usize::from(other)]);
                    assert!(its <= 0.26 * own, "{byte} and {other}: {own} and {its}");
                }
            }
        }
    }

    #[test]
    fn an_average_of_three_codes_decodes_to_the_three() {
        let codes = Codes::new();
        let [x, y, z] = [b'a', b'e', b' '].map(|byte| codes.code(byte));
        let o: Vec<f32> = (0..V).map(|i| 0.5 * x[i] + 0.3 * y[i] + 0.2 * z[i]).collect();
        let evidence = codes.evidence(&o);
        let mut bytes: Vec<u8> = (0..=255).collect();
        bytes.sort_by(|x, y| evidence[usize::from(*y)].total_cmp(&evidence[usize::from(*x)]));
        assert_eq!(bytes[..3], [b'a', b'e', b' ']);
    }

    #[test]
    fn a_segment_continues_the_one_before() {
        let codes = Codes::new();
        let text = b"the quick brown fox jumps over the lazy dog";
        let whole = Segment::new(&codes, b"", text);
        let (first, second) = text.split_at(17);
        let parts = [Segment::new(&codes, b"", first), Segment::new(&codes, first, second)];
        assert_eq!(whole.keys(), [parts[0].keys(), parts[1].keys()].concat());
        assert_eq!(whole.next_keys(), [parts[0].next_keys(), parts[1].next_keys()].concat());
        assert_eq!(whole.values, [&parts[0].values[..], &parts[1].values].concat());
    }

    #[test]
    fn a_key_depends_on_earlier_bytes_alone() {
        let codes = Codes::new();
        let row = HEADS.len() * K;
        let (x, y) = (Segment::new(&codes, b"", b"abcdefgh"), Segment::new(&codes, b"", b"abcdeXYZ"));
        assert_eq!(x.keys()[..6 * row], y.keys()[..6 * row]);
        assert_ne!(x.keys()[6 * row..], y.keys()[6 * row..]);
    }

    #[test]
    fn heads_look_back_no_further_than_a_segment_remembers() {
        assert!(HEADS.iter().all(|head| head.context <= MAX_CONTEXT));
    }
}
