//! A unit: one CUDA source with named constants and its parameter struct, as text for NVRTC.

use std::fmt::{self, Write};

use crate::params::Layout;
use crate::{Arch, DType, Field, Params};

/// A CUDA file that travels inside the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Name for `#include`, such as `fla/core/prelude.cuh`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// A compile-time constant of a kernel: a member of its `Cfg`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Constant {
    /// `static constexpr int`.
    Int(i32),
    /// `static constexpr bool`.
    Bool(bool),
    /// `static constexpr float`, passed by its bits.
    F32(f32),
    /// A type alias.
    Type(DType),
}

impl From<i32> for Constant {
    fn from(x: i32) -> Self {
        Self::Int(x)
    }
}

impl From<bool> for Constant {
    fn from(x: bool) -> Self {
        Self::Bool(x)
    }
}

impl From<f32> for Constant {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

impl From<DType> for Constant {
    fn from(x: DType) -> Self {
        Self::Type(x)
    }
}

/// The value as a reader would write it.
impl fmt::Display for Constant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(x) => write!(f, "{x}"),
            Self::Bool(x) => write!(f, "{x}"),
            Self::F32(x) => write!(f, "{x}"),
            Self::Type(x) => f.write_str(x.name()),
        }
    }
}

/// One kernel with all its constants: what is compiled, cached and launched as one.
///
/// The function `fla::<crate>::<stem><Cfg>` in `source` becomes the entry `<crate>_<file>`, which takes the
/// parameter struct by value.
#[derive(Clone, Debug)]
pub struct Unit {
    krate: &'static str,
    stem: &'static str,
    source: Source,
    headers: &'static [Source],
    layout: Layout,
    threads: u32,
    min_blocks: u32,
    smem_bytes: u32,
    spill_limit: u32,
    constants: Vec<(&'static str, Constant)>,
}

impl Unit {
    /// The kernel `fla::<krate>::<stem>` of `source`, launched with blocks of `threads`.
    ///
    /// `krate` is the crate's name without `fla-`, with underscores.
    #[must_use]
    pub const fn new<P: Params>(
        krate: &'static str,
        stem: &'static str,
        source: Source,
        threads: u32,
    ) -> Self {
        Self {
            krate,
            stem,
            source,
            headers: &[],
            layout: Layout::of::<P>(),
            threads,
            min_blocks: 1,
            smem_bytes: 0,
            spill_limit: 0,
            constants: Vec::new(),
        }
    }

    /// Adds headers beside the ones of this crate.
    #[must_use]
    pub const fn with_headers(mut self, headers: &'static [Source]) -> Self {
        self.headers = headers;
        self
    }

    /// Adds a constant: `Cfg::<name>` in the kernel.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Constant>) -> Self {
        self.constants.push((name, value.into()));
        self
    }

    /// Asks the compiler to leave room for this many blocks on one multiprocessor.
    #[must_use]
    pub const fn with_min_blocks(mut self, blocks: u32) -> Self {
        self.min_blocks = blocks;
        self
    }

    /// Asks for dynamic shared memory: the size of the kernel's `fla::<crate>::<Stem>Shared<Cfg>`, which the
    /// unit compares with this number while it is compiled.
    #[must_use]
    pub const fn with_smem_bytes(mut self, bytes: u32) -> Self {
        self.smem_bytes = bytes;
        self
    }

    /// Lets the assembler spill this many bytes for a thread, where a kernel that does is better than none; no byte unless
    /// changed.
    #[must_use]
    pub const fn with_spill_limit(mut self, bytes: u32) -> Self {
        self.spill_limit = bytes;
        self
    }

    /// Bytes that the assembler may spill for a thread.
    #[must_use]
    pub const fn spill_limit(&self) -> u32 {
        self.spill_limit
    }

    /// Name of the entry in the cubin, as profilers show it: the crate and the stem of the source, which ends in an
    /// architecture when the source is for one.
    #[must_use]
    pub fn symbol(&self) -> String {
        let file = self.source.name.rsplit('/').next().unwrap_or_default();
        format!("{}_{}", self.krate, file.trim_end_matches(".cu"))
    }

    /// Threads of a block.
    #[must_use]
    pub const fn threads(&self) -> u32 {
        self.threads
    }

    /// Dynamic shared memory of a block.
    #[must_use]
    pub const fn smem_bytes(&self) -> u32 {
        self.smem_bytes
    }

    /// The constants as `K=64, T=bf16`.
    #[must_use]
    pub fn constants(&self) -> String {
        self.constants.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
    }

    /// The file that holds the kernel.
    #[must_use]
    pub const fn source(&self) -> Source {
        self.source
    }

    pub(crate) const fn layout(&self) -> Layout {
        self.layout
    }

    /// The source and every header that it includes, directly or through others.
    ///
    /// A name that is nowhere is left for NVRTC to report.
    pub(crate) fn files(&self) -> Vec<Source> {
        let mut files = vec![self.source];
        let mut next = 0;
        while next < files.len() {
            for name in files[next].text.lines().filter_map(included) {
                let known = files.iter().any(|file| file.name == name);
                let header = crate::HEADERS.iter().chain(self.headers).find(|header| header.name == name);
                if let (false, Some(header)) = (known, header) {
                    files.push(*header);
                }
            }
            next += 1;
        }
        files
    }

    /// The text of the compilation unit.
    #[must_use]
    pub fn text(&self) -> String {
        let Self { krate, stem, threads, min_blocks, .. } = self;
        let params = self.layout.cuda_type;
        let mut text = format!("#include <{}>\nstruct Cfg {{\n", self.source.name);
        for (name, value) in &self.constants {
            let line = match value {
                Constant::Int(x) => format!("    static constexpr int {name} = {x};"),
                Constant::Bool(x) => format!("    static constexpr bool {name} = {x};"),
                Constant::F32(x) => {
                    format!(
                        "    static constexpr float {name} = __builtin_bit_cast(float, {:#010x}u);",
                        x.to_bits()
                    )
                }
                Constant::Type(x) => format!("    using {name} = {};", x.cuda_name()),
            };
            text.push_str(&line);
            text.push('\n');
        }
        text.push_str("};\n");
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "static_assert(sizeof({params}) == {}, \"{params}: size differs between Rust and CUDA\");",
            self.layout.bytes
        );
        for field in self.layout.fields {
            assert_field(&mut text, params, "", field);
            for inner in field.nested {
                let at = Field { offset: field.offset + inner.offset, ..*inner };
                assert_field(&mut text, params, &format!("{}.", field.name), &at);
            }
        }
        if self.smem_bytes > 0 {
            let shared = format!("fla::{krate}::{}Shared<Cfg>", upper_camel(stem));
            let _ = writeln!(
                text,
                "static_assert(sizeof({shared}) == {}, \"{shared}: size differs between Rust and CUDA\");",
                self.smem_bytes
            );
        }
        let _ = writeln!(
            text,
            "extern \"C\" __global__ __launch_bounds__({threads}, {min_blocks}) void {}\
             (const __grid_constant__ {params} p) {{\n    fla::{krate}::{stem}<Cfg>(p);\n}}",
            self.symbol()
        );
        text
    }

    /// Everything that the cubin depends on but the compiler's version: what cache entries are compared by.
    pub(crate) fn key(&self, arch: Arch) -> Vec<u8> {
        let mut key = format!(
            "fla-core {}\narch {arch}\noptions {:?}\n{}",
            env!("CARGO_PKG_VERSION"),
            crate::compile::OPTIONS,
            self.text()
        );
        for file in self.files() {
            let _ = write!(key, "\n--- {} {}\n{}", file.name, file.text.len(), file.text);
        }
        key.into_bytes()
    }
}

/// Asserts where a field of `params` lies and what it is; `within` is the field around it and a dot, or nothing.
fn assert_field(text: &mut String, params: &str, within: &str, field: &Field) {
    let Field { name, cuda_type, offset, .. } = field;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "static_assert(__INTADDR__(&(({params}*)0)->{within}{name}) == {offset}, \
         \"{params}::{within}{name}: offset differs between Rust and CUDA\");\n\
         static_assert(fla::same<decltype({params}::{within}{name}), {cuda_type}>, \
         \"{params}::{within}{name}: type differs between Rust and CUDA\");"
    );
}

/// The name in `#include <name>`.
fn included(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("#include <")?.split_once('>').map(|(name, _)| name)
}

fn upper_camel(stem: &str) -> String {
    let mut out = String::new();
    for word in stem.split('_') {
        let mut letters = word.chars();
        if let Some(first) = letters.next() {
            out.extend(first.to_uppercase());
            out.push_str(letters.as_str());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::upper_camel;

    #[test]
    fn stems_become_type_names() {
        assert_eq!(upper_camel("chunk_fwd_intra"), "ChunkFwdIntra");
    }
}
