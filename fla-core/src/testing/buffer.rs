//! Device buffers with NaN inside and guard words around, for tests.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr};
use half::{bf16, f16};

use crate::Element;

/// Elements before and after the payload; a multiple of every alignment that kernels need.
const GUARD: usize = 256;

/// A value that no kernel computes and that spoils whatever reads it.
pub trait Poison: Element + PartialEq + std::fmt::Debug {
    /// A NaN with a payload of its own.
    const POISON: Self;

    /// The bits, widened.
    fn bits(self) -> u32;
}

impl Poison for f32 {
    const POISON: Self = Self::from_bits(0x7fc5_a5a5);

    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Poison for bf16 {
    const POISON: Self = Self::from_bits(0x7fe5);

    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Poison for f16 {
    const POISON: Self = Self::from_bits(0x7fa5);

    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// A device buffer with poison on both sides, which is checked whenever the buffer is read and when it is
/// dropped. An input read out of bounds turns the result into NaN; an output written out of bounds is an error.
#[derive(Debug)]
pub struct Guarded<T: Poison> {
    name: String,
    memory: CudaSlice<T>,
    len: usize,
    checked: bool,
}

impl<T: Poison> Guarded<T> {
    /// An output: poison everywhere, so that an element that nobody wrote shows.
    ///
    /// # Panics
    ///
    /// When the device refuses.
    #[must_use]
    pub fn output(stream: &Arc<CudaStream>, name: &str, len: usize) -> Self {
        Self::input(stream, name, &vec![T::POISON; len])
    }

    /// An input with these values.
    ///
    /// # Panics
    ///
    /// When the device refuses.
    #[must_use]
    pub fn input(stream: &Arc<CudaStream>, name: &str, values: &[T]) -> Self {
        let guard = vec![T::POISON; GUARD];
        let memory = stream.clone_htod(&[&guard, values, &guard].concat()).expect("test data fit the device");
        Self { name: name.into(), memory, len: values.len(), checked: false }
    }

    /// The payload, to be read by a kernel.
    #[must_use]
    pub fn view(&self) -> CudaView<'_, T> {
        self.memory.slice(GUARD..GUARD + self.len)
    }

    /// The payload, to be written by a kernel.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.checked = false;
        self.memory.slice_mut(GUARD..GUARD + self.len)
    }

    /// The payload on the host.
    ///
    /// # Panics
    ///
    /// When a guard word has changed, or the device fails.
    #[must_use]
    pub fn read(&mut self) -> Vec<T> {
        let all = self.memory.stream().clone_dtoh(&self.memory).expect("the device returns test data");
        self.memory.stream().synchronize().expect("the device finishes");
        self.checked = true;
        let payload = GUARD..GUARD + self.len;
        for (i, value) in all.iter().enumerate() {
            let at = i as isize - GUARD as isize;
            let intact = payload.contains(&i) || value.bits() == T::POISON.bits();
            assert!(intact, "`{}` was written out of bounds: element {at} of {}", self.name, self.len);
        }
        all[payload].to_vec()
    }

    /// The payload on the host, widened to f64 for a comparison.
    ///
    /// # Panics
    ///
    /// As [`Guarded::read`].
    #[must_use]
    pub fn read_f64(&mut self) -> Vec<f64> {
        self.read().into_iter().map(|x| f64::from(x.to_f32())).collect()
    }
}

impl<T: Poison> Drop for Guarded<T> {
    fn drop(&mut self) {
        // A failing test is already unwinding, and a second panic would hide its reason.
        if !self.checked && !std::thread::panicking() {
            let _ = self.read();
        }
    }
}

/// A device buffer of what is no element: every bit set, which is NaN in every float format, and more of it on either side
/// that nobody may write. For workspaces and states in a form of their own.
#[derive(Debug)]
pub struct Bits<T> {
    memory: CudaSlice<T>,
    fill: T,
}

impl<T: DeviceRepr + Copy + PartialEq> Bits<T> {
    /// `len` elements that are all `fill`, which has every bit set.
    ///
    /// # Panics
    ///
    /// When the device refuses.
    #[must_use]
    pub fn new(stream: &Arc<CudaStream>, len: usize, fill: T) -> Self {
        Self {
            memory: stream.clone_htod(&vec![fill; len + 2 * GUARD]).expect("test data fit the device"),
            fill,
        }
    }

    /// The elements in the middle, to be read by a kernel.
    #[must_use]
    pub fn view(&self) -> CudaView<'_, T> {
        self.memory.slice(GUARD..self.memory.len() - GUARD)
    }

    /// The elements in the middle, to be written by a kernel.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        let end = self.memory.len() - GUARD;
        self.memory.slice_mut(GUARD..end)
    }

    /// The elements in the middle on the host, when nothing around them was written.
    ///
    /// # Panics
    ///
    /// When something was, or the device fails.
    pub fn read(&self, name: &str) -> Vec<T> {
        let all = self.memory.stream().clone_dtoh(&self.memory).expect("the device returns test data");
        let (before, rest) = all.split_at(GUARD);
        let (payload, after) = rest.split_at(rest.len() - GUARD);
        assert!(before.iter().chain(after).all(|x| *x == self.fill), "`{name}` was written out of bounds");
        payload.to_vec()
    }
}

/// Whether two results are the same bit by bit; the first difference otherwise.
///
/// # Errors
///
/// The position and both values of the first difference.
pub fn same_bits<T: Poison>(name: &str, first: &[T], second: &[T]) -> Result<(), String> {
    if first.len() != second.len() {
        return Err(format!("`{name}` has {} elements, then {}", first.len(), second.len()));
    }
    match first.iter().zip(second).position(|(a, b)| a.bits() != b.bits()) {
        None => Ok(()),
        Some(i) => Err(format!(
            "`{name}` is not the same twice: element {i} is {:?}, then {:?}",
            first[i], second[i]
        )),
    }
}
