//! The commands and their flags, which are also the help.

use clap::{Args, Parser, Subcommand};

/// The commands of this workspace.
///
/// Exit code 0: everything passed. 1: something was checked and failed. 2: the command could not run.
#[derive(Debug, Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", max_term_width = 110)]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What can be asked for, in the order in which a newcomer meets it.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check the house rules that a program can check, and print `path:line: message`.
    ///
    /// Opening sentences, imports, headers of CUDA files, parameter twins, dependency edges, one name in every
    /// layer, and whether the paths, symbols and commands that documents name exist.
    Tidy,
    Find(FindArgs),
}

/// Print where a name lives in every layer of every crate.
///
/// One stem names a thing everywhere: the plan and the one-call function in Rust, the CUDA file, the
/// parameter twins, the reference, the test, the tolerance and the bench. Give a pass (`recurrent_fwd`),
/// a pass with its stage (`chunk_fwd_intra`) or a building block (`tri_inverse`).
#[derive(Debug, Args)]
pub(crate) struct FindArgs {
    /// The stem, in snake case.
    pub(crate) stem: String,
}
