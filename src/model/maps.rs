//! The maps and sets of the core: those of the standard library with a faster hash.
//!
//! A key of etcd is hashed some dozen times on its way; SipHash took a fifth of a burst. foldhash is seeded
//! anew in each process, as SipHash is: who names pods can't choose names that collide.

use foldhash::fast::RandomState;

/// A hash map.
pub type HashMap<K, V> = std::collections::HashMap<K, V, RandomState>;
/// A hash set.
pub type HashSet<T> = std::collections::HashSet<T, RandomState>;
