//! Sizes of structs of shared memory, which the host asks for and a unit compares with the kernel's own.

use crate::DType;

/// Tokens of `TokenTile`, and rows and columns of `AccTile`.
const TILE: usize = 16;

/// Size and alignment of a struct of shared memory, member by member as the compiler lays it out.
///
/// ```
/// use fla_core::SmemLayout;
///
/// let member = SmemLayout::new(4, 4);
/// assert_eq!(SmemLayout::default().with(member).with(SmemLayout::new(16, 16)).finished().bytes(), 32);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmemLayout {
    bytes: usize,
    align: usize,
}

/// A struct without members.
impl Default for SmemLayout {
    fn default() -> Self {
        Self::new(0, 1)
    }
}

impl SmemLayout {
    /// A member of so many bytes at a multiple of `align` bytes.
    #[must_use]
    pub const fn new(bytes: usize, align: usize) -> Self {
        Self { bytes, align }
    }

    /// `fla::BlockTile`: blocks of 8 by 8 in bf16.
    #[must_use]
    pub const fn block_tile(parts: usize, rows: usize, cols: usize) -> Self {
        Self::new(parts * rows * cols * 2, 128)
    }

    /// `fla::TokenTile`: 16 padded rows.
    #[must_use]
    pub const fn token_tile(dtype: DType, cols: usize) -> Self {
        let pad = if matches!(dtype, DType::F32) { (40 - cols % 32) % 32 } else { 8 };
        Self::new(TILE * (cols + pad) * dtype.bytes(), 16)
    }

    /// `fla::AccTile`: 16 by 16 numbers in f32.
    #[must_use]
    pub const fn acc_tile() -> Self {
        Self::new(TILE * TILE * 4, 16)
    }

    /// The struct with one more member.
    #[must_use]
    pub fn with(self, member: Self) -> Self {
        let bytes = self.bytes.next_multiple_of(member.align) + member.bytes;
        Self { bytes, align: self.align.max(member.align) }
    }

    /// The struct with an array more.
    #[must_use]
    pub fn with_many(self, count: usize, member: Self) -> Self {
        (0..count).fold(self, |all, _| all.with(member))
    }

    /// The struct with the bytes after its last member: what it takes as a member or an element.
    #[must_use]
    pub fn finished(self) -> Self {
        Self { bytes: self.bytes.next_multiple_of(self.align), ..self }
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.bytes
    }
}
