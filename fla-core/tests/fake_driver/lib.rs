//! A CUDA driver without a GPU: enough of one to open a device, hold memory, load a module and refuse to.
//!
//! Built as `libfake_driver.so`; the tests copy it to `libcuda.so`. What it does is told by variables:
//! `FAKE_INIT` (status of `cuInit`), `FAKE_VERSION`, `FAKE_DEVICES`, `FAKE_CAPABILITY` (as `90`),
//! `FAKE_REFUSED_LOADS` (how many modules are refused first), `FAKE_FREE_BYTES` (what one allocation may take).
#![allow(non_snake_case, reason = "the driver's names")]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "the driver's functions, documented by NVIDIA")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "every pointer is one that the driver's caller owns")]

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{self, without_provenance_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_IMAGE: c_int = 200;
const INVALID_DEVICE: c_int = 101;

type Handle = *mut c_void;

/// Not null; nothing looks behind it.
const HANDLE: Handle = without_provenance_mut(0x1000);

fn variable(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

unsafe fn put<T>(place: *mut T, value: T) -> c_int {
    if place.is_null() {
        return INVALID_VALUE;
    }
    unsafe { place.write(value) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(_flags: u32) -> c_int {
    variable("FAKE_INIT", 0) as c_int
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    unsafe { put(version, variable("FAKE_VERSION", 13_040) as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(_code: c_int, name: *mut *const c_char) -> c_int {
    unsafe { put(name, c"FAKE".as_ptr()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_code: c_int, text: *mut *const c_char) -> c_int {
    unsafe { put(text, c"said by the fake driver".as_ptr()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    unsafe { put(count, variable("FAKE_DEVICES", 1) as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    if ordinal as usize >= variable("FAKE_DEVICES", 1) {
        return INVALID_DEVICE;
    }
    unsafe { put(device, ordinal) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> c_int {
    let capability = variable("FAKE_CAPABILITY", 90);
    let answer = match attribute {
        75 => capability / 10,
        76 => capability % 10,
        16 => 132,
        97 => 232_448,
        115 => 1,
        _ => 0,
    };
    unsafe { put(value, answer as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, _device: c_int) -> c_int {
    unsafe { put(context, HANDLE) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> c_int {
    unsafe { put(context, HANDLE) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(_context: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, _stream: Handle) -> c_int {
    if bytes > variable("FAKE_FREE_BYTES", usize::MAX) {
        return OUT_OF_MEMORY;
    }
    // Leaked, as befits a test process that soon ends; aligned like device memory.
    let words = vec![0u128; bytes.div_ceil(16) + 16].leak();
    unsafe { put(address, (words.as_ptr() as u64).next_multiple_of(256)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeAsync(_address: u64, _stream: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(address: u64, byte: u8, bytes: usize, _stream: Handle) -> c_int {
    unsafe { ptr::write_bytes(address as *mut u8, byte, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const u8,
    bytes: usize,
    _stream: Handle,
) -> c_int {
    unsafe { ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut u8,
    from: u64,
    bytes: usize,
    _stream: Handle,
) -> c_int {
    unsafe { ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Handle, _flags: u32) -> c_int {
    unsafe { put(event, HANDLE) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(_event: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(_event: Handle, _stream: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(ms: *mut f32, _start: Handle, _end: Handle) -> c_int {
    unsafe { put(ms, 1.0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, _start: Handle, _end: Handle) -> c_int {
    unsafe { put(ms, 1.0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(_stream: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(_stream: Handle, _event: Handle, _flags: u32) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const u8) -> c_int {
    static LOADS: AtomicUsize = AtomicUsize::new(0);
    let refused = LOADS.fetch_add(1, Ordering::Relaxed) < variable("FAKE_REFUSED_LOADS", 0);
    let magic = unsafe { std::slice::from_raw_parts(image, 4) };
    if refused || magic != b"\x7fELF" {
        return INVALID_IMAGE;
    }
    unsafe { put(module, HANDLE) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(_module: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    _module: Handle,
    _name: *const c_char,
) -> c_int {
    unsafe { put(function, HANDLE) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    _attribute: c_int,
    _function: Handle,
) -> c_int {
    unsafe { put(value, 32) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetAttribute(_function: Handle, _attribute: c_int, _value: c_int) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    _config: *const c_void,
    _function: Handle,
    _arguments: *mut Handle,
    _extra: *mut Handle,
) -> c_int {
    SUCCESS
}
