//! The program: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;

use etcd_registrar::cli::Cli;

fn main() -> ExitCode {
    etcd_registrar::app::run(Cli::parse())
}
