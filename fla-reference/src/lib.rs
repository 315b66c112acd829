#![doc = include_str!("../README.md")]

mod check;
mod heads;
mod maps;
mod matrix;
mod outputs;

pub mod chunk;
pub mod compare;
pub mod dplr;
pub mod gated_delta;
pub mod inputs;
pub mod rwkv4;
pub mod rwkv6;
pub mod rwkv7;
pub mod seqs;
pub mod token_shift;
pub mod tolerance;

pub use crate::seqs::{SeqLens, Shape};
