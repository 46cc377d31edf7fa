//! The ServiceRegistration type: what a user writes, what the operator answers, and the
//! CustomResourceDefinition that the API server checks both against.
//!
//! Takes nothing, gives the types of `spec` and `status`, the names of conditions and reasons
//! ([`reason`]) and the definition as YAML ([`crd_yaml`]). Must never hold a rule that
//! [`crate::accept`] does not check again: an object can be older than the definition. (Optional
//! members are `with` their bare type in the schema: absent and null would else be two things.)
//!
//! Members that this version does not know are ignored, as everywhere in Kubernetes; a value that
//! it does not know (another format, another family) makes the whole spec unreadable, so that what
//! a newer version registered is left alone.

// The derive of KubeSchema puts a copy of each type inside a function, where its `pub` means nothing.
#![allow(unreachable_pub)]
// Each printer column has a type of its own; the lint takes those of two columns for one attribute.
#![allow(clippy::duplicated_attributes)]

pub mod reason;
mod schema;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::core::CustomResourceExt;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The TTL of a registration that names none, in seconds (the design's default).
pub const DEFAULT_LEASE_TTL_SECONDS: i32 = 60;
/// The shortest TTL in seconds; below it a single lost keepalive would let records expire.
pub const MIN_LEASE_TTL_SECONDS: i32 = 5;
/// The longest TTL in seconds: one day.
pub const MAX_LEASE_TTL_SECONDS: i32 = 86_400;
/// The weight of a registration that names none: what CoreDNS takes for none, too.
pub const DEFAULT_WEIGHT: i32 = 100;
/// The largest weight: the field of an SRV record has 16 bits.
pub const MAX_WEIGHT: i32 = 65_535;
/// The most ports of one registration.
pub const MAX_PORTS: usize = 16;
/// The most entries of each of `metadata.labels`, `metadata.annotations` and `metadata.static`,
/// so that a record stays a small part of what etcd takes in one request (1.5 MiB).
pub const MAX_METADATA: usize = 32;
/// The most characters of a name in `metadata`: a DNS subdomain, `/` and 63, as Kubernetes says.
pub const MAX_LABEL_KEY: usize = 317;
/// The most characters of a value in `metadata.static`.
pub const MAX_STATIC_VALUE: usize = 256;
/// The most characters of all names and values of the metadata of a record, so that 50,000 endpoints, the
/// most of a namespace by default, leave room in an etcd of 2 GiB.
pub const MAX_METADATA_CHARS: usize = 8_192;
/// The most characters of the template of a key: those of the longest key.
pub const MAX_KEY_TEMPLATE: usize = 1_024;
/// The most characters of the template of a value: ten times a record of usual size.
pub const MAX_VALUE_TEMPLATE: usize = 4_096;
/// The most entries of each part of a selector.
pub const MAX_SELECTOR: usize = 32;
/// The most values of one expression of a selector.
pub const MAX_SELECTOR_VALUES: usize = 64;
/// The most endpoints that a status lists; the counts are always whole.
pub const MAX_STATUS_ENDPOINTS: usize = 100;

/// What to register: which pods, on which ports, under which keys.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "etcd-registrar.io",
    version = "v1alpha1",
    kind = "ServiceRegistration",
    plural = "serviceregistrations",
    singular = "serviceregistration",
    shortname = "sreg",
    category = "discovery",
    namespaced,
    status = "ServiceRegistrationStatus",
    derive = "PartialEq",
    doc = "Registers the ready endpoints of pods in etcd, where everything outside this cluster can read them.",
    printcolumn(
        name = "Service",
        type_ = "string",
        json_path = ".status.service",
        description = "The name in the registry"
    ),
    printcolumn(
        name = "Format",
        type_ = "string",
        json_path = ".spec.format.type",
        description = "How endpoints become records"
    ),
    printcolumn(
        name = "Registered",
        type_ = "integer",
        json_path = ".status.registered",
        description = "Endpoints of this cluster, as read from etcd"
    ),
    printcolumn(
        name = "Discovered",
        type_ = "integer",
        json_path = ".status.discovered",
        description = "Endpoints of this service from every cluster"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#,
        description = "Whether every wanted record was read back"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#,
        description = "Why it is ready or not",
        priority = 1
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.prefix) || self.prefix != '' || self.format.type != 'Json'")
        .message("format Json needs a prefix that ends with a slash, for example `/services/`; only Plain, Grpc and Template can do without")
        .field_path(".prefix"),
    validation = Rule::new("!has(self.prefix) || !self.prefix.startsWith('/') || self.format.type != 'Grpc'")
        .message("format Grpc takes no leading slash, because gRPC clients dial etcd:///{prefix}{service}: write for example `grpc/`, or nothing")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'Kitex' || !has(self.prefix) || (self.prefix != '' && !self.prefix.startsWith('/'))")
        .message("format Kitex needs a prefix without a leading slash, because its client reads `{prefix}{service}/` as the prefix is written: write for example `kitex/registry-etcd/`")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'Hertz' || !has(self.prefix) || self.prefix == 'hertz/registry-etcd/'")
        .message("the client of Hertz reads below `hertz/registry-etcd/` and can be given no other prefix: leave `prefix` out")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'Kratos' || !has(self.prefix) || self.prefix.startsWith('/')")
        .message("format Kratos needs a prefix with a leading slash, because its client reads `/{namespace}/{service}`: write for example `/microservices/`")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'Kratos' || self.ports.all(p, has(p.scheme) && p.scheme in ['http', 'https', 'grpc', 'grpcs'] && self.ports.exists_one(q, has(q.scheme) && q.scheme == p.scheme))")
        .message("Kratos uses the first endpoint of each scheme: write a scheme of its own for each port, `http`, `https`, `grpc` or `grpcs`, and register a second port of one scheme under a service of its own")
        .field_path(".ports"),
    validation = Rule::new("self.format.type != 'SkyDns' || !has(self.prefix)")
        .message("the prefix of format SkyDns is made from its path and zone: leave `prefix` out")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'SkyDns' || !has(self.service) || (self.service.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$') && self.service != 'any')")
        .message("with format SkyDns the service is a label of DNS: write lower-case letters, digits and `-`, beginning and ending with a letter or digit, at most 63 characters, without dots, and not `any`")
        .field_path(".service"),
    validation = Rule::new("self.format.type != 'SkyDns' || self.ports.all(p, size(p.name) <= 62)")
        .message("with format SkyDns the name of a port is a label of DNS with an underscore before it: write at most 62 characters")
        .field_path(".ports"),
    validation = Rule::new("self.format.type != 'GoMicro' || !has(self.prefix) || self.prefix == '/micro/registry/'")
        .message("the client of go-micro reads below `/micro/registry/` and can be given no other prefix: leave `prefix` out")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'Traefik' || !has(self.prefix) || (self.prefix != '' && !self.prefix.startsWith('/'))")
        .message("format Traefik needs the root key of Traefik's provider as its prefix, without a leading slash: write for example `traefik/`")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'Traefik' || self.ports.all(p, has(p.scheme) && p.scheme in ['http', 'https', 'h2c'] && p.protocol == 'TCP') || self.ports.all(p, !has(p.scheme) && p.protocol == 'TCP') || self.ports.all(p, !has(p.scheme) && p.protocol == 'UDP')")
        .message("the ports of a registration for Traefik are all of one kind: TCP with the scheme `http`, `https` or `h2c` for HTTP services, or all TCP, or all UDP, without a scheme; register others in a ServiceRegistration of their own")
        .field_path(".ports"),
    validation = Rule::new("self.format.type != 'Apisix' || !has(self.prefix) || (self.prefix.startsWith('/') && self.prefix.endsWith('/upstreams/'))")
        .message("format Apisix needs the prefix of APISIX's etcd and `/upstreams/` as its prefix, because APISIX reads upstreams nowhere else: write for example `/apisix/upstreams/`")
        .field_path(".prefix"),
    validation = Rule::new("self.format.type != 'Apisix' || self.ports.all(p, has(p.scheme) && (p.protocol == 'TCP' && p.scheme in ['http', 'https', 'grpc', 'grpcs', 'tcp', 'tls'] || p.protocol == 'UDP' && p.scheme == 'udp'))")
        .message("with format Apisix each port needs a scheme of an upstream: write TCP and `http`, `https`, `grpc`, `grpcs`, `tcp` or `tls`, or UDP and `udp`")
        .field_path(".ports"),
    validation = Rule::new("!(self.format.type in ['Json', 'Plain', 'Grpc', 'Kitex', 'Hertz', 'Kratos']) || self.ports.all(p, !has(p.port) || self.ports.exists_one(q, has(q.port) && q.port == p.port))")
        .message("two ports have one number, but the keys of this format hold no more than address and number: register each of them under a service of its own")
        .field_path(".ports"),
)]
pub struct ServiceRegistrationSpec {
    /// The service's name in the registry; the object's own name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(max = 253))]
    #[x_kube(validation = Rule::new(r"self.matches('^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$') && !self.contains('..')")
        .message("service becomes one segment of a key: write letters, digits, `.`, `_` and `-`, beginning and ending with a letter or digit, without `/` and without `..`"))]
    pub service: Option<String>,

    /// Which pods of the namespace are registered. It must not be empty.
    #[schemars(schema_with = "schema::selector")]
    pub selector: LabelSelector,

    /// The ports to register, 1 to 16; one endpoint each per pod and address family.
    #[schemars(
        length(min = 1, max = 16),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub ports: Vec<Port>,

    /// The address families to register, of those that a pod has. The pod's primary one when
    /// absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub address_families: Vec<AddressFamily>,

    /// Whose address is registered: the pod's, or its node's with the port's hostPort, for
    /// readers that have no route to pods.
    #[serde(default)]
    pub address: Address,

    /// How an endpoint is written.
    #[serde(default)]
    pub format: FormatSpec,

    /// Where the keys begin. It ends with a slash, and the operator's policy must grant it to the
    /// namespace. The format's own when absent: `/services/` for Json, `/` for Plain, none for
    /// Grpc, `kitex/registry-etcd/` for Kitex, `hertz/registry-etcd/` for Hertz, `/microservices/` for
    /// Kratos, `/micro/registry/` for GoMicro, `traefik/` for Traefik, `/apisix/upstreams/` for Apisix, none
    /// for Template. That of SkyDns comes from its path and zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(max = 256))]
    #[x_kube(
        validation = Rule::new("self == '' || self.endsWith('/')")
            .message("prefix must end with a slash, for example `/services/`: without it, readers of `web` would see `web2`, too"),
        validation = Rule::new("!self.contains('//')")
            .message("prefix must have no empty segment: write one slash instead of two"),
        validation = Rule::new(r"!self.matches('(^|/)[.][.]?(/|$)')")
            .message("prefix must have no segment `.` or `..`: write the whole path"),
        validation = Rule::new(r"!self.matches(r'\p{Cc}')")
            .message("prefix must have no control characters"),
        validation = Rule::new("!self.matches('[*{}]')")
            .message("prefix must have no `*`, `{` or `}`: write the namespace or path itself"),
    )]
    pub prefix: Option<String>,

    /// How long the records outlive the last operator that keeps them alive, in seconds.
    #[serde(rename = "leaseTTLSeconds", default = "default_lease_ttl_seconds")]
    #[schemars(range(min = 5, max = 86400))]
    pub lease_ttl_seconds: i32,

    /// The share of each endpoint among those of its service, for formats that hold one.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 1, max = 65535))]
    pub weight: i32,

    /// What the records tell beside the address, for formats that hold it.
    #[serde(default, skip_serializing_if = "MetadataSpec::is_empty")]
    pub metadata: MetadataSpec,

    /// Register pods that are not ready, too.
    #[serde(default)]
    pub publish_not_ready: bool,

    /// Keep what is registered and change nothing.
    #[serde(default)]
    pub suspend: bool,
}

impl Default for ServiceRegistrationSpec {
    /// What the API server would fill in; selector and ports are empty and would be refused.
    fn default() -> Self {
        Self {
            service: None,
            selector: LabelSelector::default(),
            ports: Vec::new(),
            address_families: Vec::new(),
            address: Address::default(),
            format: FormatSpec::default(),
            prefix: None,
            lease_ttl_seconds: DEFAULT_LEASE_TTL_SECONDS,
            weight: DEFAULT_WEIGHT,
            metadata: MetadataSpec::default(),
            publish_not_ready: false,
            suspend: false,
        }
    }
}

fn default_lease_ttl_seconds() -> i32 {
    DEFAULT_LEASE_TTL_SECONDS
}

fn default_weight() -> i32 {
    DEFAULT_WEIGHT
}

/// A port of the pods.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// The port's name in the registry, and the name of the container port when `port` is
    /// absent; a pod that has no port of that name is left out.
    #[schemars(length(max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')")
        .message("the name of a port must be a DNS label: lower-case letters, digits and `-`, beginning and ending with a letter or digit, for example `http`"))]
    pub name: String,

    /// The port's number, declared by a container or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "i32", range(min = 1, max = 65535))]
    pub port: Option<i32>,

    /// The transport protocol.
    #[serde(default)]
    pub protocol: PortProtocol,

    /// The scheme for formats that write URLs, for example `http` or `grpc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z][a-z0-9+.-]*$')")
        .message("scheme must be that of a URL in lower case, without `://`, for example `http`"))]
    pub scheme: Option<String>,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum PortProtocol {
    /// The default of Kubernetes.
    #[default]
    Tcp,
    /// User datagrams.
    Udp,
    /// Stream control transmission.
    Sctp,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AddressFamily {
    /// Version 4.
    IPv4,
    /// Version 6.
    IPv6,
}

/// Whose address is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Address {
    /// The pod's.
    #[default]
    Pod,
    /// Its node's, with the hostPort of the port.
    Host,
}

/// How an endpoint is written: a type, and below a name of its own what that type has to be told.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.type != 'SkyDns' || has(self.skyDns)")
        .message("format SkyDns needs the zone that CoreDNS serves: write for example `skyDns: {zone: skydns.local}`"),
    validation = Rule::new("self.type == 'SkyDns' || !has(self.skyDns)")
        .message("skyDns has the settings of the format SkyDns alone: leave it out, or write `type: SkyDns`"),
    validation = Rule::new("self.type != 'Template' || has(self.template)")
        .message("format Template needs templates: write for example `template: {key: 'web/{{ addr }}', value: '{{ addr }}'}`"),
    validation = Rule::new("self.type == 'Template' || !has(self.template)")
        .message("template has the settings of the format Template alone: leave it out, or write `type: Template`"),
)]
pub struct FormatSpec {
    /// Json: everything that a client may want, below `{prefix}{namespace}/{service}/{cluster}/`.
    /// All others stand below `{prefix}{service}/` where nothing else is said. Plain: the bare
    /// address. Grpc: what the resolver of gRPC-Go reads. Kitex, Hertz, Kratos, GoMicro: what the
    /// registries of those frameworks read. SkyDns: what CoreDNS reads, below
    /// `/{path}/{zone reversed}/{namespace}/{service}/`. Traefik: what the KV provider of Traefik 3
    /// reads, as services `{namespace}.{service}.{port}`. Apisix: upstreams of APISIX, one for all endpoints of a
    /// port, `{prefix}{cluster}.{namespace}.{service}.{port}`. Template: keys and values of one's own.
    #[serde(rename = "type")]
    pub type_: FormatType,

    /// The settings of SkyDns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "SkyDnsSpec")]
    pub sky_dns: Option<SkyDnsSpec>,

    /// The settings of Template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TemplateSpec")]
    pub template: Option<TemplateSpec>,
}

/// The settings of the format Template: templates in the language of Jinja. What they can name: cluster,
/// namespace, service, pod, uid, node, zone, host, addr, port, port_name, protocol, scheme, family, weight,
/// ttl, labels, annotations, metadata; and the filters tojson, urlencode, dns_label, reverse_dns, sha256, lower.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TemplateSpec {
    /// The whole key. It begins with prefix and service, and differs between two endpoints, for
    /// example `web/{{ addr }}`.
    #[schemars(length(min = 1, max = 1024))]
    pub key: String,

    /// The value, for example `{{ addr }}`. The address stands in it or in the last segment of the key.
    #[schemars(length(min = 1, max = 4096))]
    pub value: String,

    /// What the value has to be.
    #[serde(default)]
    pub value_type: ValueType,
}

/// What a value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum ValueType {
    /// Anything.
    #[default]
    Text,
    /// A JSON document.
    Json,
}

/// The settings of the format SkyDns.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SkyDnsSpec {
    /// The zone that CoreDNS serves, for example `skydns.local`.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$') && !self.matches('(^|[.])any([.]|$)')")
        .message("zone must be a domain name in lower case, without a dot at its end and without a label `any`, for example `skydns.local`"))]
    pub zone: String,

    /// The first segment of the keys: the `path` of CoreDNS' plugin `etcd`.
    #[serde(default = "default_sky_dns_path")]
    #[schemars(length(max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?$')")
        .message("path must be one segment of letters, digits, `_` and `-`, beginning and ending with a letter or digit, for example `skydns`"))]
    pub path: String,

    /// How long resolvers may go on answering with a record, in seconds.
    #[serde(default = "default_sky_dns_ttl")]
    #[schemars(range(min = 1, max = 86400))]
    pub ttl: i32,
}

fn default_sky_dns_path() -> String {
    crate::format::sky_dns::DEFAULT_PATH.to_owned()
}

fn default_sky_dns_ttl() -> i32 {
    i32::try_from(crate::format::sky_dns::DEFAULT_TTL).unwrap_or(i32::MAX)
}

/// The formats of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum FormatType {
    /// The project's own.
    #[default]
    Json,
    /// The bare address.
    Plain,
    /// The naming package of etcd's Go client.
    Grpc,
    /// The registry of Kitex.
    Kitex,
    /// The registry of Hertz.
    Hertz,
    /// The registry of Kratos.
    Kratos,
    /// The plugin `etcd` of CoreDNS.
    SkyDns,
    /// The etcd registry of go-micro.
    GoMicro,
    /// The KV provider of Traefik 3.
    Traefik,
    /// Upstreams of APISIX.
    Apisix,
    /// Templates of one's own.
    Template,
}

/// What the records tell beside the address. A name may stand in one of the lists only.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.labels) || !has(self.annotations) || self.labels.all(l, !(l in self.annotations))")
        .message("a name stands in both metadata.labels and metadata.annotations: write it in one of them"),
    validation = Rule::new("!has(self.labels) || !has(self.static) || self.labels.all(l, !(l in self.static))")
        .message("a name stands in both metadata.labels and metadata.static: write it in one of them"),
    validation = Rule::new("!has(self.annotations) || !has(self.static) || self.annotations.all(a, !(a in self.static))")
        .message("a name stands in both metadata.annotations and metadata.static: write it in one of them"),
)]
pub struct MetadataSpec {
    /// The labels of the pod to copy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::label_keys")]
    pub labels: Vec<String>,

    /// The annotations of the pod to copy; those that are too long are left out, and so are labels
    /// and annotations for which the 8,192 characters of a record's metadata have no room.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::label_keys")]
    pub annotations: Vec<String>,

    /// What is the same for every endpoint.
    #[serde(rename = "static", default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::statics")]
    pub statics: BTreeMap<String, String>,
}

impl MetadataSpec {
    /// Whether nothing is to be told.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.annotations.is_empty() && self.statics.is_empty()
    }
}

/// What was read back from etcd, never what was merely sent.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRegistrationStatus {
    /// The `metadata.generation` that this status tells of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "i64")]
    pub observed_generation: Option<i64>,

    /// The service's name in the registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub service: Option<String>,

    /// The pods behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PodCounts")]
    pub pods: Option<PodCounts>,

    /// Endpoints of this cluster, confirmed by a read from etcd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "i64")]
    pub registered: Option<i64>,

    /// Endpoints of this service from every cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "i64")]
    pub discovered: Option<i64>,

    /// The endpoints of each cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub clusters: Vec<ClusterCount>,

    /// The first 100 endpoints, sorted; the counts above are always whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "atomic"))]
    pub endpoints: Vec<EndpointStatus>,

    /// Ready, Conflict and Accepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How many pods are behind a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodCounts {
    /// Pods that the selector matches.
    pub selected: i64,
    /// Those of them that are ready.
    pub ready: i64,
}

/// How many endpoints a cluster has.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterCount {
    /// The cluster's name.
    pub name: String,
    /// Its endpoints of this service.
    pub endpoints: i64,
}

/// An endpoint as it was read from etcd. What the format does not hold is left out.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    /// `host:port`.
    pub address: String,
    /// The name of the port.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub port: String,
    /// The cluster that registered it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cluster: String,
    /// The pod's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod: String,
    /// The node's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The zone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub zone: String,
    /// The id of the lease in hexadecimal, as etcdctl writes it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub lease: String,
    /// The key in etcd.
    pub key: String,
}

/// The CustomResourceDefinition can't be written as YAML.
#[derive(Debug, thiserror::Error)]
#[error(
    "the CustomResourceDefinition can't be written as YAML: {0}; this is a defect of this program"
)]
pub struct CrdError(#[from] serde_yaml::Error);

/// The CustomResourceDefinition as YAML, as `crds/serviceregistrations.yaml` holds it.
///
/// # Errors
///
/// When it can't be serialized, which a test rules out.
pub fn crd_yaml() -> Result<String, CrdError> {
    let yaml = serde_yaml::to_string(&ServiceRegistration::crd())?;
    Ok(format!(
        "# Written by `etcd-registrar crd`; after a change of src/api, `make crds` writes it anew.\n{yaml}"
    ))
}

#[cfg(test)]
mod tests;
