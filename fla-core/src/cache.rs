//! Compiled units on disk: found by their whole text, written by rename, compiled once by many processes.

use std::env;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::compile::{self, Version};
use crate::{Arch, Error, Unit};

/// First bytes of every entry; the number changes with the layout below.
const MAGIC: &[u8; 12] = b"fla cubin 1\n";

/// Longer than any unit compiles. A process that waits longer compiles for itself.
const LOCK_PATIENCE: Duration = Duration::from_secs(60);

/// A folder of compiled units.
///
/// An entry is found by the whole text of its unit with every header, the options, the architecture, this
/// crate's version and NVRTC's version, all compared byte by byte; a checksum covers the rest. What does not
/// match is compiled again, with a warning through `tracing`, and never loaded. A folder that cannot be written
/// only loses the cache. On a machine without NVRTC, entries of any NVRTC version are taken: that is how
/// compiled kernels are shipped.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: Option<PathBuf>,
}

/// Where a cubin came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Read from the cache.
    Disk,
    /// Compiled by this call.
    Compiled,
}

/// Device code with its origin.
#[derive(Clone, Debug)]
pub(crate) struct Cubin {
    /// The device code.
    pub(crate) bytes: Vec<u8>,
    /// Where it came from.
    pub(crate) origin: Origin,
}

impl Cache {
    /// The user's cache: `FLA_CACHE_DIR`, or `fla` in `XDG_CACHE_HOME`, or `.cache/fla` in the home folder.
    ///
    /// An empty `FLA_CACHE_DIR` turns the cache off.
    #[must_use]
    pub fn from_env() -> Self {
        let path = |name| env::var_os(name).map(PathBuf::from);
        Self::from_paths(path("FLA_CACHE_DIR"), path("XDG_CACHE_HOME"), env::home_dir())
    }

    fn from_paths(fla: Option<PathBuf>, xdg: Option<PathBuf>, home: Option<PathBuf>) -> Self {
        if let Some(dir) = fla {
            return Self { dir: Some(dir).filter(|dir| !dir.as_os_str().is_empty()) };
        }
        let base = xdg.filter(|dir| dir.is_absolute()).or_else(|| home.map(|home| home.join(".cache")));
        Self { dir: base.map(|base| base.join("fla")) }
    }

    /// A cache in this folder, which is made when the first entry is written.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: Some(dir.into()) }
    }

    /// No cache: every process compiles what it uses.
    #[must_use]
    pub const fn none() -> Self {
        Self { dir: None }
    }

    /// The folder, if there is one.
    #[must_use]
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Compiles units ahead of time, so that later first calls find them; needs no GPU.
    ///
    /// A model crate's `units()` lists the shapes that most users run. The filled folder can be copied to
    /// machines that have a driver but no NVRTC, and named there in `FLA_CACHE_DIR`.
    ///
    /// # Errors
    ///
    /// Those of [`compile`](crate::compile::compile), and [`Error::Cache`] when an entry cannot be written.
    pub fn warm(&self, units: &[Unit], arch: Arch) -> Result<(), Error> {
        for unit in units {
            self.get(unit, arch)?;
            let Some(dir) = &self.dir else { continue };
            let entry = Entry::new(dir, &unit.symbol(), arch, compile::nvrtc_version().ok(), unit.key(arch));
            if !matches!(entry.read(), Ok(Found::Hit(_))) {
                let source = io::Error::other("the entry was not written; see the warning before this");
                return Err(Error::Cache { path: entry.path(), source });
            }
        }
        Ok(())
    }

    /// The cubin of a unit, from disk or else compiled and stored.
    pub(crate) fn get(&self, unit: &Unit, arch: Arch) -> Result<Cubin, Error> {
        let version = compile::nvrtc_version();
        let Some(dir) = &self.dir else {
            version?;
            return compile::compile(unit, arch).map(|c| Cubin { bytes: c.cubin, origin: Origin::Compiled });
        };
        let entry = Entry::new(dir, &unit.symbol(), arch, version.as_ref().ok().copied(), unit.key(arch));
        entry.get_or_build(|| {
            version?;
            Ok(compile::compile(unit, arch)?.cubin)
        })
    }

    /// Forgets an entry that the driver refused.
    pub(crate) fn remove(&self, unit: &Unit, arch: Arch) {
        if let Some(dir) = &self.dir {
            let version = compile::nvrtc_version().ok();
            Entry::new(dir, &unit.symbol(), arch, version, unit.key(arch)).remove();
        }
    }
}

/// One entry of a cache: the file that a key belongs in.
struct Entry<'a> {
    dir: &'a Path,
    /// `<symbol>-<arch>-`, so that a listing of the folder can be read.
    prefix: String,
    /// The version of the compiler at hand; none when there is no compiler.
    version: Option<Version>,
    key: Vec<u8>,
}

enum Found {
    Hit(Vec<u8>),
    Nothing,
    /// There is a file, but it is not this entry; the text says why.
    Bad(String),
}

impl<'a> Entry<'a> {
    fn new(dir: &'a Path, symbol: &str, arch: Arch, version: Option<Version>, key: Vec<u8>) -> Self {
        Self { dir, prefix: format!("{symbol}-{arch}-"), version, key }
    }

    fn suffix(&self) -> String {
        format!("-{:016x}.cubin", fnv(&self.key))
    }

    fn path(&self) -> PathBuf {
        let version = self.version.map_or_else(|| "any".into(), |version| version.to_string());
        self.dir.join(format!("{}nvrtc{version}{}", self.prefix, self.suffix()))
    }

    fn get_or_build(&self, build: impl FnOnce() -> Result<Vec<u8>, Error>) -> Result<Cubin, Error> {
        if let Some(bytes) = self.read_or_warn() {
            return Ok(Cubin { bytes, origin: Origin::Disk });
        }
        // Held until the entry is written, so that of many processes one compiles and the others read.
        let lock = self.lock();
        if lock.is_some()
            && let Some(bytes) = self.read_or_warn()
        {
            return Ok(Cubin { bytes, origin: Origin::Disk });
        }
        let bytes = build()?;
        // Without the lock another process may be writing, or the folder cannot be written.
        if lock.is_some()
            && let Err(error) = self.write(&bytes)
        {
            self.warn(
                "cannot write a kernel cache entry; it will be compiled again next time",
                &error.to_string(),
            );
        }
        Ok(Cubin { bytes, origin: Origin::Compiled })
    }

    fn warn(&self, message: &str, reason: &str) {
        tracing::warn!(path = %self.path().display(), reason, "{message}");
    }

    fn read_or_warn(&self) -> Option<Vec<u8>> {
        let reason = match self.read() {
            Ok(Found::Hit(bytes)) => return Some(bytes),
            Ok(Found::Nothing) => return None,
            Ok(Found::Bad(reason)) => reason,
            Err(error) => error.to_string(),
        };
        self.warn("a kernel cache entry cannot be used and will be compiled again", &reason);
        None
    }

    fn read(&self) -> io::Result<Found> {
        if self.version.is_some() {
            return self.read_from(&self.path());
        }
        // No compiler, hence no version to insist on: any entry of this key will do.
        let entries = match fs::read_dir(self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(error),
        };
        let suffix = self.suffix();
        let mut found = Found::Nothing;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(&self.prefix) && name.ends_with(&suffix) {
                found = self.read_from(&entry.path())?;
                if matches!(found, Found::Hit(_)) {
                    break;
                }
            }
        }
        Ok(found)
    }

    fn read_from(&self, path: &Path) -> io::Result<Found> {
        match fs::read(path) {
            Ok(file) => Ok(self.parse(&file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Magic, then major, minor, key length, payload length and checksum as little-endian u64, key, payload.
    fn parse(&self, file: &[u8]) -> Found {
        let bad = |reason: &str| Found::Bad(reason.into());
        let Some(rest) = file.strip_prefix(MAGIC) else { return bad("it does not start as an entry") };
        let Some((head, body)) = rest.split_at_checked(40) else { return bad("it is cut off in its head") };
        let mut words = head.chunks_exact(8).map(|word| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            u64::from_le_bytes(bytes)
        });
        let mut word = || words.next().unwrap_or(0);
        let (major, minor, key_len, payload_len, checksum) = (word(), word(), word(), word(), word());
        if let Some(version) = self.version
            && (u64::from(version.major), u64::from(version.minor)) != (major, minor)
        {
            return bad("it was made by another NVRTC");
        }
        if key_len.checked_add(payload_len) != Some(body.len() as u64) {
            return bad("it is cut off or too long");
        }
        let (key, payload) = body.split_at(key_len as usize);
        if key != self.key {
            return bad("it belongs to another kernel");
        }
        if fnv(payload) != checksum {
            return bad("its checksum does not match");
        }
        Found::Hit(payload.to_vec())
    }

    /// The lock of this entry, or none when the folder cannot be written or another process holds it too long.
    fn lock(&self) -> Option<File> {
        let path = self.path().with_extension("lock");
        let attempt = || -> io::Result<File> {
            fs::create_dir_all(self.dir)?;
            let file = File::create(&path)?;
            let start = Instant::now();
            loop {
                match file.try_lock() {
                    Ok(()) => return Ok(file),
                    Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_PATIENCE => {
                        thread::sleep(Duration::from_millis(2));
                    }
                    Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::TimedOut.into()),
                    Err(TryLockError::Error(error)) => return Err(error),
                }
            }
        };
        match attempt() {
            Ok(file) => Some(file),
            Err(error) => {
                self.warn(
                    "the kernel cache cannot be written; this process compiles for itself",
                    &error.to_string(),
                );
                None
            }
        }
    }

    /// Only the holder of the lock writes, so one temporary name is enough, and a leftover of a killed writer is
    /// overwritten.
    fn write(&self, payload: &[u8]) -> io::Result<()> {
        let path = self.path();
        let temporary = path.with_extension("tmp");
        let version = self.version.unwrap_or(Version { major: 0, minor: 0 });
        let head = [
            u64::from(version.major),
            u64::from(version.minor),
            self.key.len() as u64,
            payload.len() as u64,
            fnv(payload),
        ];
        let attempt = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(MAGIC)?;
            for word in head {
                file.write_all(&word.to_le_bytes())?;
            }
            file.write_all(&self.key)?;
            file.write_all(payload)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        attempt().inspect_err(|_| {
            // What was half written is of no use to anybody; that it cannot be removed either changes nothing.
            let _ = fs::remove_file(&temporary);
        })
    }

    fn remove(&self) {
        let _ = fs::remove_file(self.path());
    }
}

/// FNV-1a: stable between releases, unlike the standard library's hasher. It only names files and finds
/// damage; what decides is the comparison of the whole key.
fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::{Arch, Cache, Entry, Found, Origin, Version};
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Stdio};
    use std::thread;
    use std::time::Duration;

    const V13: Version = Version { major: 13, minor: 0 };
    const CUBIN: &[u8] = b"not really device code";

    /// A folder of its own for each test, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("fla-cache-test-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn entry(dir: &Path) -> Entry<'_> {
        Entry::new(dir, "core_test", Arch::SM_90, Some(V13), b"key".to_vec())
    }

    fn get(entry: &Entry<'_>) -> Origin {
        let cubin = entry.get_or_build(|| Ok(CUBIN.to_vec())).expect("the builder does not fail");
        assert_eq!(cubin.bytes, CUBIN);
        cubin.origin
    }

    #[test]
    fn the_second_call_reads_what_the_first_wrote() {
        let folder = Folder::new("second");
        assert_eq!(get(&entry(&folder.0)), Origin::Compiled);
        assert_eq!(get(&entry(&folder.0)), Origin::Disk);
    }

    #[test]
    fn damaged_and_foreign_entries_are_compiled_again() {
        let folder = Folder::new("damaged");
        let entry = entry(&folder.0);
        get(&entry);
        let good = fs::read(entry.path()).expect("the entry was written");
        let flipped = |at: usize| {
            let mut bad = good.clone();
            bad[at] ^= 1;
            bad
        };
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("empty", Vec::new()),
            ("cut off in the magic", good[..5].to_vec()),
            ("cut off in the head", good[..30].to_vec()),
            ("cut off in the payload", good[..good.len() - 1].to_vec()),
            ("one byte too many", [&good[..], b"x"].concat()),
            (
                "another program's file",
                b"\x7fELF and so on, long enough to hold a head of forty bytes".to_vec(),
            ),
            ("another NVRTC", flipped(12)),
            ("a length that overflows", [&good[..28], &[0xff; 16], &good[44..]].concat()),
            ("another key", flipped(good.len() - CUBIN.len() - 1)),
            ("another payload", flipped(good.len() - 1)),
        ];
        for (name, bad) in cases {
            fs::write(entry.path(), bad).expect("the folder is writable");
            assert!(matches!(entry.read(), Ok(Found::Bad(_))), "{name} was taken");
            assert_eq!(get(&entry), Origin::Compiled, "{name}");
            assert_eq!(get(&entry), Origin::Disk, "{name} was not replaced");
        }
    }

    #[test]
    fn without_a_compiler_entries_of_any_version_are_taken() {
        let folder = Folder::new("shipped");
        get(&entry(&folder.0));
        let without = Entry::new(&folder.0, "core_test", Arch::SM_90, None, b"key".to_vec());
        assert_eq!(get(&without), Origin::Disk);
        let other = Version { major: 13, minor: 5 };
        let with_other = Entry::new(&folder.0, "core_test", Arch::SM_90, Some(other), b"key".to_vec());
        assert_eq!(get(&with_other), Origin::Compiled);
    }

    #[test]
    fn a_folder_that_cannot_be_written_only_loses_the_cache() {
        // Under a file no folder can be made, whoever asks.
        let folder = Folder::new("unwritable");
        fs::create_dir_all(&folder.0).expect("the temporary folder is writable");
        let file = folder.0.join("file");
        fs::write(&file, b"").expect("the temporary folder is writable");
        let under_a_file = file.join("cache");
        assert_eq!(get(&entry(&under_a_file)), Origin::Compiled);
        assert_eq!(get(&entry(&under_a_file)), Origin::Compiled);
    }

    #[test]
    fn an_entry_that_cannot_be_replaced_is_compiled_each_time() {
        // Stands for a full disk and for a read-only file: the rename is refused because the name is a folder.
        let folder = Folder::new("full");
        let entry = entry(&folder.0);
        fs::create_dir_all(entry.path().join("occupied")).expect("the temporary folder is writable");
        assert_eq!(get(&entry), Origin::Compiled);
        assert_eq!(get(&entry), Origin::Compiled);
        assert!(!entry.path().with_extension("tmp").exists(), "the temporary file was left behind");
    }

    #[cfg(unix)]
    #[test]
    fn a_read_only_folder_serves_its_entries() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new("readonly");
        let hit = entry(&folder.0);
        get(&hit);
        fs::remove_file(hit.path().with_extension("lock")).expect("the lock file is there");
        let mode = |mode| fs::set_permissions(&folder.0, fs::Permissions::from_mode(mode));
        mode(0o555).expect("own folder");
        let origin = get(&hit);
        let miss = Entry::new(&folder.0, "core_test", Arch::SM_90, Some(V13), b"other key".to_vec());
        let missed = get(&miss);
        mode(0o755).expect("own folder");
        assert_eq!((origin, missed), (Origin::Disk, Origin::Compiled));
    }

    #[test]
    fn threads_that_ask_at_once_build_once() {
        let folder = Folder::new("threads");
        let built = std::sync::atomic::AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let build = || {
                        built.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(50));
                        Ok(CUBIN.to_vec())
                    };
                    assert_eq!(entry(&folder.0).get_or_build(build).expect("builds").bytes, CUBIN);
                });
            }
        });
        assert_eq!(built.into_inner(), 1);
    }

    /// Not a test of its own: what the child processes of the two tests below run, told by variables.
    #[test]
    fn child_process() {
        let (Some(dir), Some(role)) = (std::env::var_os("FLA_TEST_DIR"), std::env::var_os("FLA_TEST_ROLE"))
        else {
            return;
        };
        let dir = PathBuf::from(dir);
        let entry = entry(&dir);
        if role == "killed" {
            let _lock = entry.lock().expect("the folder is writable");
            fs::write(entry.path().with_extension("tmp"), &CUBIN[..4]).expect("the folder is writable");
            println!("ready");
            thread::sleep(Duration::from_secs(60));
        }
        let build = || {
            fs::write(dir.join(format!("built-{}", std::process::id())), b"")
                .expect("the folder is writable");
            thread::sleep(Duration::from_millis(300));
            Ok(CUBIN.to_vec())
        };
        assert_eq!(entry.get_or_build(build).expect("builds").bytes, CUBIN);
    }

    fn child(dir: &Path, role: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("the test executable"));
        command.args(["--exact", "cache::tests::child_process", "--nocapture"]);
        command.env("FLA_TEST_DIR", dir).env("FLA_TEST_ROLE", role).stdout(Stdio::piped());
        command
    }

    #[test]
    fn processes_that_start_at_once_build_once() {
        let folder = Folder::new("processes");
        let children: Vec<_> =
            (0..4).map(|_| child(&folder.0, "builds").spawn().expect("the test executable runs")).collect();
        for child in children {
            assert!(child.wait_with_output().expect("the child ends").status.success());
        }
        let built = fs::read_dir(&folder.0).expect("the folder is there").flatten();
        let built = built.filter(|e| e.file_name().to_string_lossy().starts_with("built-")).count();
        assert_eq!(built, 1);
        assert_eq!(get(&entry(&folder.0)), Origin::Disk);
    }

    #[test]
    fn a_killed_writer_leaves_nothing_that_matters() {
        use std::io::{BufRead, BufReader};
        let folder = Folder::new("killed");
        let mut writer = child(&folder.0, "killed").spawn().expect("the test executable runs");
        let lines = BufReader::new(writer.stdout.take().expect("piped")).lines();
        // The child holds the lock and has written half a file once it says so.
        assert!(
            lines.map_while(Result::ok).any(|line| line.contains("ready")),
            "the child never got the lock"
        );
        writer.kill().expect("own child");
        writer.wait().expect("own child");
        assert_eq!(get(&entry(&folder.0)), Origin::Compiled);
        assert_eq!(get(&entry(&folder.0)), Origin::Disk);
    }

    #[test]
    fn the_folder_follows_the_variables() {
        let dir = |fla: Option<&str>, xdg: Option<&str>, home: Option<&str>| {
            Cache::from_paths(fla.map(Into::into), xdg.map(Into::into), home.map(Into::into)).dir
        };
        let home = Some("/me");
        assert_eq!(dir(Some("/mine"), Some("/xdg"), home), Some("/mine".into()));
        assert_eq!(dir(Some(""), Some("/xdg"), home), None, "an empty FLA_CACHE_DIR turns the cache off");
        assert_eq!(dir(None, Some("/xdg"), home), Some("/xdg/fla".into()));
        assert_eq!(dir(None, None, home), Some("/me/.cache/fla".into()));
        for not_absolute in ["", "xdg"] {
            assert_eq!(dir(None, Some(not_absolute), home), Some("/me/.cache/fla".into()));
        }
        assert_eq!(dir(None, None, None), None);

        assert_eq!(Cache::at("/x").dir(), Some(Path::new("/x")));
        assert_eq!(Cache::none().dir(), None);
    }
}
