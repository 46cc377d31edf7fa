//! Which version this is, and from which commit it was built.
//!
//! Takes what `hack/image` set while it compiled; a build without it says that its commit is unknown, and is the same
//! whatever the commit. Must never read a clock.

use std::sync::LazyLock;

/// The version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// For `--version` and the first line of the log: version, commit, its time, and for which kind of machine.
pub static BUILD: LazyLock<String> = LazyLock::new(|| {
    let commit = option_env!("ETCD_REGISTRAR_COMMIT").unwrap_or("unknown");
    let of = option_env!("ETCD_REGISTRAR_COMMIT_DATE")
        .map_or(String::new(), |date| format!(" of {date}"));
    let libc = if cfg!(target_env = "musl") {
        ", static"
    } else {
        ""
    };
    format!(
        "{VERSION} (commit {commit}{of}, {}{libc})",
        std::env::consts::ARCH
    )
});
