//! Which version this is, and from which commit it was built.
//!
//! Takes what `hack/image` set while it compiled; a build without it says that its commit is unknown, and is the same
//! whatever the commit. Must never read a clock.

use std::sync::LazyLock;

/// The version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit that it was built from, in full; `-dirty` after it when files differed from it.
pub const COMMIT: &str = match option_env!("ETCD_REGISTRAR_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// For `--version`: version, commit, its time, and for which kind of machine.
pub static BUILD: LazyLock<String> = LazyLock::new(|| {
    let of = option_env!("ETCD_REGISTRAR_COMMIT_DATE")
        .map_or(String::new(), |date| format!(" of {date}"));
    let libc = if cfg!(target_env = "musl") {
        ", static"
    } else {
        ""
    };
    let architecture = std::env::consts::ARCH;
    format!("{VERSION} (commit {COMMIT}{of}, {architecture}{libc})")
});
