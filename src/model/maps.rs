//! The maps and sets of the core: those of the standard library with a faster hash.
//!
//! A key of etcd is hashed some dozen times on its way, and the standard hash is made for safety first. foldhash is
//! seeded anew in each process, so that collisions can't be prepared by who names pods; it promises less than SipHash
//! against someone who could measure single look-ups, which nobody can from outside.

use foldhash::fast::RandomState;

/// A hash map.
pub type HashMap<K, V> = std::collections::HashMap<K, V, RandomState>;
/// A hash set.
pub type HashSet<T> = std::collections::HashSet<T, RandomState>;
