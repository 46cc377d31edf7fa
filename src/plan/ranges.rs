//! Which ranges of etcd the mirror follows.
//!
//! Takes the scopes that are wanted or named below `leases/`, gives ranges that do not overlap. Must
//! never give a bare granted prefix: what other tenants or programs keep there is none of our business.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::etcd::Range;

/// Above so many scopes, those of one parent (a namespace, in the Json format) are joined into one
/// watch: each watch costs a request for its snapshot, and etcd some 350 bytes.
const MANY: usize = 512;

/// The ranges for the scopes, and for the operator's own prefix.
#[must_use]
pub fn ranges(own_prefix: &str, scopes: &BTreeSet<&str>) -> Vec<Range> {
    let mut prefixes: BTreeSet<&str> = if scopes.len() > MANY {
        joined(scopes)
    } else {
        scopes.clone()
    };
    prefixes.insert(own_prefix);
    let mut chosen: Vec<&str> = Vec::with_capacity(prefixes.len());
    // Sorted, so a prefix comes right before all that it contains.
    for prefix in prefixes {
        if !chosen.last().is_some_and(|last| prefix.starts_with(last)) {
            chosen.push(prefix);
        }
    }
    chosen
        .into_iter()
        .map(|prefix| Range::prefix(prefix.as_bytes()))
        .collect()
}

fn joined<'a>(scopes: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
    let mut by_parent: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for scope in scopes {
        by_parent.entry(parent(scope)).or_default().push(scope);
    }
    by_parent
        .into_iter()
        .flat_map(|(parent, children)| {
            // A parent of one segment is as bare as a prefix gets.
            let deep = parent.trim_matches('/').contains('/');
            if deep && children.len() > 1 {
                vec![parent]
            } else {
                children
            }
        })
        .collect()
}

fn parent(scope: &str) -> &str {
    let trimmed = scope.strip_suffix('/').unwrap_or(scope);
    trimmed
        .rfind('/')
        .map_or("", |at| scope.get(..=at).unwrap_or(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contained_scopes_need_no_watch_of_their_own() {
        let scopes = BTreeSet::from(["/web/", "/web/x/", "/web2/"]);
        let found = ranges("/registrar/east/", &scopes);
        let expected: Vec<Range> = ["/registrar/east/", "/web/", "/web2/"]
            .iter()
            .map(|p| Range::prefix(p.as_bytes()))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn many_scopes_of_one_namespace_share_a_watch_but_never_a_bare_prefix() {
        let names: Vec<String> = (0..600)
            .map(|n| format!("/services/shop/s{n}/"))
            .chain((0..10).map(|n| format!("/plain{n}/")))
            .collect();
        let scopes: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let found = ranges("/registrar/east/", &scopes);
        assert_eq!(found.len(), 1 + 1 + 10);
        assert!(found.contains(&Range::prefix(b"/services/shop/")));
        for name in &names {
            assert_eq!(
                found
                    .iter()
                    .filter(|range| range.contains(name.as_bytes()))
                    .count(),
                1,
                "{name}"
            );
        }
    }
}
