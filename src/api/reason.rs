//! The types and reasons of conditions, and the reasons of events: a documented list.
//!
//! Takes and gives nothing but names. Must never lose one: people and scripts match on them.

/// The condition that every wanted record was read back from etcd.
pub const READY: &str = "Ready";
/// The condition that a wanted key belongs to someone else.
pub const CONFLICT: &str = "Conflict";
/// The condition that the spec can be served and the policy grants it.
pub const ACCEPTED: &str = "Accepted";

/// Ready=True: every wanted record was read back, also when none is wanted.
pub const REGISTERED: &str = "Registered";
/// Ready=False: records are on their way to etcd.
pub const PENDING: &str = "Pending";
/// Ready=False: some pods can't be registered as asked (e.g. they lack a named port).
pub const PODS_LEFT_OUT: &str = "PodsLeftOut";
/// Ready=False: the policy limits the endpoints of a registration or namespace, and there are more.
pub const TOO_MANY_ENDPOINTS: &str = "TooManyEndpoints";
/// Ready=False: the namespace has had more records put than it may, and some wait.
pub const TOO_MANY_CHANGES: &str = "TooManyChanges";
/// Ready=False: too many pods went at once although they are there, and some of their endpoints are held.
pub const REMOVALS_HELD: &str = "RemovalsHeld";
/// Ready=Unknown: etcd does not answer; what is registered stays as long as its leases.
pub const REGISTRY_UNREACHABLE: &str = "RegistryUnreachable";
/// Ready=Unknown: no replica leads, so nothing changes and nothing expires.
pub const NO_LEADER: &str = "NoLeader";
/// Ready=False: etcd is out of space (alarm NOSPACE); only removals go on.
pub const NO_SPACE: &str = "NoSpace";
/// Ready=False: the operator's etcd user may not touch a key of this registration.
pub const PERMISSION_DENIED: &str = "PermissionDenied";
/// Ready=False: etcd refused a record, for example because it is too large.
pub const RECORD_REFUSED: &str = "RecordRefused";
/// Ready=False: the spec is not accepted; what it had registered stays.
pub const NOT_ACCEPTED: &str = "NotAccepted";
/// Ready=False: `suspend` is set; what is registered stays and nothing changes.
pub const SUSPENDED: &str = "Suspended";
/// Ready=False: a wanted key belongs to someone else; see the condition `Conflict`.
pub const CONFLICTING: &str = "Conflicting";

/// Conflict=False: every wanted key is free or this registration's own.
pub const NO_CONFLICT: &str = "NoConflict";
/// Conflict=True: a wanted key belongs to another registration of this cluster, which is older.
pub const OTHER_REGISTRATION: &str = "OtherRegistration";
/// Conflict=True: two pods of this registration want one key.
pub const OTHER_POD: &str = "OtherPod";
/// Conflict=True: a wanted key was written by someone else (another cluster or a person).
pub const KEY_TAKEN: &str = "KeyTaken";

/// Accepted=True: the spec is served. The reason has the condition's name, as in Gateway API.
pub const SPEC_ACCEPTED: &str = "Accepted";
/// Accepted=False: the policy does not grant this; the message has the rule that would.
pub const NOT_GRANTED: &str = "NotGranted";
/// Accepted=False: the spec breaks a rule of the API; the message says which.
pub const INVALID: &str = "Invalid";
/// Accepted=False: keys would stand among the operator's own ones.
pub const RESERVED_PREFIX: &str = "ReservedPrefix";
/// Accepted=False: the policy limits the registrations of a namespace, and older ones are served.
pub const TOO_MANY_REGISTRATIONS: &str = "TooManyRegistrations";
/// Accepted=False: this version can't read the spec (a newer one wrote it).
pub const UNREADABLE: &str = "Unreadable";

/// Event: the endpoints of a registration are registered for the first time.
pub const EVENT_REGISTERED: &str = "Registered";
/// Event: the spec is refused.
pub const EVENT_REFUSED: &str = "Refused";
/// Event: a wanted key belongs to someone else.
pub const EVENT_CONFLICT: &str = "Conflict";
/// Event: too many pods went at once although none of them was deleted.
pub const EVENT_MASS_REMOVAL: &str = "MassRemoval";
/// Event: etcd does not answer any more.
pub const EVENT_REGISTRY_UNREACHABLE: &str = "RegistryUnreachable";
/// Event: etcd answers again.
pub const EVENT_REGISTRY_BACK: &str = "RegistryBack";
