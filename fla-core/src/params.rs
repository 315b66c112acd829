//! The parameter struct of a kernel: its Rust twin, and pointers with their access in the type.

use std::marker::PhantomData;

/// Device memory that a kernel reads: `const T*` there, null when absent.
#[repr(transparent)]
#[derive(Debug)]
pub struct Ptr<T>(pub(crate) u64, pub(crate) PhantomData<*const T>);

/// Device memory that a kernel writes: `T*` there, null when absent.
#[repr(transparent)]
#[derive(Debug)]
pub struct PtrMut<T>(pub(crate) u64, pub(crate) PhantomData<*mut T>);

impl<T> Ptr<T> {
    /// An absent tensor.
    pub const NULL: Self = Self(0, PhantomData);
}

impl<T> PtrMut<T> {
    /// An absent tensor.
    pub const NULL: Self = Self(0, PhantomData);
}

impl<T> PtrMut<T> {
    /// The same memory to be read, for a tensor that is updated in place.
    #[must_use]
    pub const fn as_const(self) -> Ptr<T> {
        Ptr(self.0, PhantomData)
    }
}

// Derived `Clone` and `Copy` would ask for them of `T`.
impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

impl<T> Clone for PtrMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for PtrMut<T> {}

/// One field of a parameter struct: name, CUDA type, offset in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Field {
    /// Name, the same on both sides.
    pub name: &'static str,
    /// Type in CUDA, such as `const float*` or `fla::i32`.
    pub cuda_type: &'static str,
    /// Offset from the start of the struct.
    pub offset: usize,
    /// Fields of this field, when it is a struct that several kernels have.
    pub nested: &'static [Field],
}

impl Field {
    /// A field; meant to be written as `Field::new("t", "fla::i32", offset_of!(Self, t))`.
    #[must_use]
    pub const fn new(name: &'static str, cuda_type: &'static str, offset: usize) -> Self {
        Self { name, cuda_type, offset, nested: &[] }
    }

    /// A field that is a struct with a twin of its own.
    #[must_use]
    pub const fn nested<P: Params>(name: &'static str, offset: usize) -> Self {
        Self { name, cuda_type: P::CUDA_TYPE, offset, nested: P::FIELDS }
    }
}

/// The host twin of a kernel's only parameter.
///
/// Every unit that takes it asserts, while NVRTC compiles it, that size, offsets and types agree with the CUDA
/// struct; so a field that moved on one side is a compile error and never a wrong result.
///
/// # Safety
///
/// The type is `#[repr(C)]`, and [`Params::FIELDS`] lists all its fields with their true offsets.
pub unsafe trait Params: Copy + 'static {
    /// The CUDA struct, with its namespace.
    const CUDA_TYPE: &'static str;

    /// All fields, in order.
    const FIELDS: &'static [Field];
}

/// What a unit needs to know of its [`Params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    pub(crate) cuda_type: &'static str,
    pub(crate) fields: &'static [Field],
    pub(crate) bytes: usize,
}

impl Layout {
    pub(crate) const fn of<P: Params>() -> Self {
        Self { cuda_type: P::CUDA_TYPE, fields: P::FIELDS, bytes: size_of::<P>() }
    }
}
