//! NVRTC: the text of a unit to a cubin, with the compiler's own report on it.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libloading::{Library, Symbol};

use crate::{Arch, Error, Unit, library};

/// Options beside the architecture. `-v` makes the assembler report registers and spills; `--no-cache` keeps NVRTC
/// from asking the driver for a result of its own, since what is compiled here is cached here.
///
/// No fast math: a kernel that may approximate says so in the name of the function that it calls.
pub(crate) const OPTIONS: &[&str] =
    &["--std=c++20", "-default-device", "-lineinfo", "--ptxas-options=-v", "--no-cache"];

/// The oldest NVRTC whose front end is known to take the generated assertions.
const OLDEST: Version = Version { major: 12, minor: 9 };

/// Version of NVRTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What the assembler says of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread that were stored to memory for lack of registers.
    pub spill_bytes: u32,
    /// Stack of a thread, in bytes.
    pub stack_bytes: u32,
    /// Static shared memory of a block, in bytes.
    pub smem_bytes: u32,
}

/// A unit compiled for one architecture.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The device code.
    pub cubin: Vec<u8>,
    /// The assembler's report.
    pub report: Report,
    /// NVRTC's log, verbatim.
    pub log: String,
    /// How long it took.
    pub elapsed: Duration,
}

/// Compiles a unit; needs NVRTC but no driver and no GPU.
///
/// # Errors
///
/// [`Error::NoNvrtc`] when there is none; [`Error::Compile`] with NVRTC's log when it refuses the text, when the
/// assembler spills more than [`Unit::spill_limit`], or when it serialises `wgmma`.
pub fn compile(unit: &Unit, arch: Arch) -> Result<Compiled, Error> {
    let nvrtc = Nvrtc::get()?;
    let span = tracing::debug_span!("fla.compile", kernel = %unit.symbol(), arch = %arch, constants = %unit.constants());
    let _entered = span.enter();
    let start = Instant::now();
    let failure = |reason: String, log: String| Error::Compile {
        kernel: unit.symbol(),
        constants: unit.constants(),
        arch,
        reason,
        log,
    };
    let (cubin, log) = nvrtc.run(unit, arch).map_err(|(reason, log)| failure(reason, log))?;
    let report = report(&log);
    if report.spill_bytes > unit.spill_limit() {
        return Err(failure(format!("it spills {} bytes of registers", report.spill_bytes), log));
    }
    if let Some(line) = log.lines().find(|line| SERIALISED.iter().any(|code| line.contains(code))) {
        return Err(failure(format!("the assembler serialises wgmma: {}", line.trim()), log));
    }
    let elapsed = start.elapsed();
    tracing::debug!(registers = report.registers, ms = elapsed.as_secs_f64() * 1e3, "compiled");
    Ok(Compiled { cubin, report, log, elapsed })
}

/// Version of the NVRTC that [`compile`] uses.
///
/// # Errors
///
/// [`Error::NoNvrtc`] when there is none.
pub fn nvrtc_version() -> Result<Version, Error> {
    Ok(Nvrtc::get()?.version)
}

/// Where the NVRTC that [`compile`] uses was opened: a path, or the name that the loader resolved.
///
/// # Errors
///
/// [`Error::NoNvrtc`] when there is none.
pub fn nvrtc_path() -> Result<&'static Path, Error> {
    Ok(&Nvrtc::get()?.path)
}

/// Warnings with which the assembler says that matrix products wait for each other.
const SERIALISED: &[&str] = &["C7508", "C7510", "C7514", "wgmma.mma_async instructions are serialized"];

type Program = *mut std::ffi::c_void;
type Status = c_int;

/// NVRTC, opened once per process.
///
/// Bound here and not through cudarc, which would open the first `libnvrtc` that the loader knows (not the one
/// that was probed), gives PTX only, and panics where one is missing.
struct Nvrtc {
    library: Library,
    path: PathBuf,
    version: Version,
}

impl Nvrtc {
    fn get() -> Result<&'static Self, Error> {
        static NVRTC: OnceLock<Result<Nvrtc, Vec<String>>> = OnceLock::new();
        let opened = NVRTC.get_or_init(|| Self::open_first(library::nvrtc_candidates()));
        opened.as_ref().map_err(|tried| Error::NoNvrtc { tried: tried.clone() })
    }

    fn open_first(candidates: Vec<PathBuf>) -> Result<Self, Vec<String>> {
        let mut tried = Vec::new();
        for path in candidates {
            match Self::open(path.clone()) {
                Ok(nvrtc) => {
                    tracing::debug!(path = %nvrtc.path.display(), version = %nvrtc.version, "opened NVRTC");
                    return Ok(nvrtc);
                }
                Err(reason) => tried.push(format!("{} ({reason})", path.display())),
            }
        }
        tried.push(library::described_places());
        Err(tried)
    }

    fn open(path: PathBuf) -> Result<Self, String> {
        // SAFETY: opening a library runs its initialisers; NVRTC's are meant to run this way.
        let library = unsafe { Library::new(&path) }.map_err(|error| library::why(&error))?;
        let (mut major, mut minor) = (0, 0);
        {
            // SAFETY: the signature is that of nvrtc.h.
            let version: Symbol<'_, unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status> =
                unsafe { library.get(b"nvrtcVersion") }.map_err(|error| library::why(&error))?;
            // SAFETY: both numbers outlive the call.
            let status = unsafe { version(&raw mut major, &raw mut minor) };
            if status != 0 {
                return Err(format!("nvrtcVersion returned {status}"));
            }
        }
        let version =
            Version { major: u32::try_from(major).unwrap_or(0), minor: u32::try_from(minor).unwrap_or(0) };
        if version < OLDEST {
            return Err(format!("is version {version}, {OLDEST} or later is needed"));
        }
        Ok(Self { library, path, version })
    }

    /// The builtins lie beside NVRTC under a name of their own that the loader does not find by itself.
    fn open_builtins(&self) {
        static ONCE: OnceLock<()> = OnceLock::new();
        ONCE.get_or_init(|| {
            let Some(dir) = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()) else { return };
            let path = dir.join(format!("libnvrtc-builtins.so.{}", self.version));
            // SAFETY: the builtins are data for NVRTC, which opens them the same way.
            match unsafe { Library::new(&path) } {
                Ok(library) => std::mem::forget(library),
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "no NVRTC builtins beside NVRTC")
                }
            }
        });
    }

    /// The cubin and the log, or what failed and the log.
    fn run(&self, unit: &Unit, arch: Arch) -> Result<(Vec<u8>, String), (String, String)> {
        self.open_builtins();
        let plain = |reason: String| (reason, String::new());
        let functions = Functions::load(&self.library).map_err(|error| plain(error.to_string()))?;

        // Sources are constants of the binary; a NUL in one is a programming error that shows as an error.
        let c_string = |text: &str| CString::new(text).map_err(|error| plain(error.to_string()));
        let text = c_string(&unit.text())?;
        let name = c_string(&format!("{}.cu", unit.symbol()))?;
        let (mut names, mut texts) = (Vec::new(), Vec::new());
        for file in unit.files() {
            names.push(c_string(file.name)?);
            texts.push(c_string(file.text)?);
        }
        let name_ptrs: Vec<*const c_char> = names.iter().map(|s| s.as_ptr()).collect();
        let text_ptrs: Vec<*const c_char> = texts.iter().map(|s| s.as_ptr()).collect();
        let count = c_int::try_from(names.len()).unwrap_or(c_int::MAX);

        let mut program: Program = ptr::null_mut();
        // SAFETY: all strings end with NUL and outlive the call; both arrays hold `count` entries.
        let status = unsafe {
            (functions.create)(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                count,
                text_ptrs.as_ptr(),
                name_ptrs.as_ptr(),
            )
        };
        functions.check(status, "nvrtcCreateProgram").map_err(plain)?;
        let program = OwnedProgram { functions: &functions, program };

        let mut options = Vec::new();
        options.push(c_string(&format!("--gpu-architecture={arch}"))?);
        for option in OPTIONS {
            options.push(c_string(option)?);
        }
        let option_ptrs: Vec<*const c_char> = options.iter().map(|s| s.as_ptr()).collect();
        let count = c_int::try_from(options.len()).unwrap_or(c_int::MAX);
        // SAFETY: the program is live, and the options outlive the call.
        let status = unsafe { (functions.compile)(program.program, count, option_ptrs.as_ptr()) };
        let log = program.log();
        if let Err(reason) = functions.check(status, "nvrtcCompileProgram") {
            return Err((reason, log));
        }
        match program.cubin() {
            Ok(cubin) => Ok((cubin, log)),
            Err(reason) => Err((reason, log)),
        }
    }
}

/// The functions of nvrtc.h that are needed, with its signatures.
struct Functions<'a> {
    create: Symbol<
        'a,
        unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Status,
    >,
    compile: Symbol<'a, unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status>,
    destroy: Symbol<'a, unsafe extern "C" fn(*mut Program) -> Status>,
    log_size: Symbol<'a, unsafe extern "C" fn(Program, *mut usize) -> Status>,
    log: Symbol<'a, unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    cubin_size: Symbol<'a, unsafe extern "C" fn(Program, *mut usize) -> Status>,
    cubin: Symbol<'a, unsafe extern "C" fn(Program, *mut c_char) -> Status>,
    error_string: Symbol<'a, unsafe extern "C" fn(Status) -> *const c_char>,
}

impl<'a> Functions<'a> {
    fn load(library: &'a Library) -> Result<Self, libloading::Error> {
        // SAFETY: the signatures are those of nvrtc.h, the same in every version from 12.0 on.
        unsafe {
            Ok(Self {
                create: library.get(b"nvrtcCreateProgram")?,
                compile: library.get(b"nvrtcCompileProgram")?,
                destroy: library.get(b"nvrtcDestroyProgram")?,
                log_size: library.get(b"nvrtcGetProgramLogSize")?,
                log: library.get(b"nvrtcGetProgramLog")?,
                cubin_size: library.get(b"nvrtcGetCUBINSize")?,
                cubin: library.get(b"nvrtcGetCUBIN")?,
                error_string: library.get(b"nvrtcGetErrorString")?,
            })
        }
    }

    fn check(&self, status: Status, call: &str) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC returns a static string for any number.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(format!("{call} returned {}", text.to_string_lossy()))
    }
}

struct OwnedProgram<'a> {
    functions: &'a Functions<'a>,
    program: Program,
}

impl OwnedProgram<'_> {
    /// Empty when NVRTC cannot give one.
    fn log(&self) -> String {
        let mut len = 0;
        // SAFETY: the program is live and `len` outlives the call.
        if unsafe { (self.functions.log_size)(self.program, &raw mut len) } != 0 || len == 0 {
            return String::new();
        }
        let mut log = vec![0u8; len];
        // SAFETY: NVRTC writes `len` bytes, the last of them NUL.
        if unsafe { (self.functions.log)(self.program, log.as_mut_ptr().cast()) } != 0 {
            return String::new();
        }
        String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program is live and `len` outlives the call.
        let status = unsafe { (self.functions.cubin_size)(self.program, &raw mut len) };
        self.functions.check(status, "nvrtcGetCUBINSize")?;
        if len == 0 {
            return Err("NVRTC made no cubin".into());
        }
        let mut cubin = vec![0u8; len];
        // SAFETY: NVRTC writes `len` bytes.
        let status = unsafe { (self.functions.cubin)(self.program, cubin.as_mut_ptr().cast()) };
        self.functions.check(status, "nvrtcGetCUBIN")?;
        Ok(cubin)
    }
}

impl Drop for OwnedProgram<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created by the same library and is destroyed once.
        let _ = unsafe { (self.functions.destroy)(&raw mut self.program) };
    }
}

/// Reads the assembler's lines, such as `Used 40 registers, used 1 barriers, 1024 bytes smem` and
/// `0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads`.
fn report(log: &str) -> Report {
    let before = |what: &str| {
        log.lines()
            .filter_map(|line| {
                let (head, _) = line.split_once(what)?;
                head.rsplit(|c: char| !c.is_ascii_digit()).find(|s| !s.is_empty())?.parse::<u32>().ok()
            })
            .max()
            .unwrap_or(0)
    };
    Report {
        registers: before(" registers"),
        spill_bytes: before(" bytes spill stores"),
        stack_bytes: before(" bytes stack frame"),
        smem_bytes: before(" bytes smem"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, Nvrtc, Report, report};

    #[test]
    fn a_missing_nvrtc_is_an_error_that_lists_what_was_tried() {
        let tried = Nvrtc::open_first(vec!["/nowhere/libnvrtc.so.13".into(), "libnot-nvrtc.so".into()])
            .err()
            .expect("neither is there");
        let text = Error::NoNvrtc { tried }.to_string();
        for part in ["/nowhere/libnvrtc.so.13 (", "libnot-nvrtc.so (", "FLA_CUDA_LIB_DIR", "/usr/local/cuda"]
        {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn a_library_that_is_not_nvrtc_is_not_taken() {
        // The C library is on the loader's path of every Linux, and has no `nvrtcVersion`.
        let tried = Nvrtc::open_first(vec!["libc.so.6".into()]).err().expect("it is another library");
        assert!(tried[0].contains("nvrtcVersion"), "{tried:?}");
    }

    #[test]
    fn the_assemblers_log_is_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
                   ptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
                   ptxas info    : Function properties for k\n    \
                   16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n\
                   ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem\n";
        assert_eq!(report(log), Report { registers: 40, spill_bytes: 12, stack_bytes: 16, smem_bytes: 1024 });
        assert_eq!(report(""), Report::default());
    }
}
