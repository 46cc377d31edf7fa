//! Certificates of the harness's own: an authority and what it signs.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

use crate::error::{Context, Result};
use crate::workdir::write_private;

/// A certificate authority, with its certificate in a file.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
    cert: PathBuf,
}

/// The files of a certificate and its key.
#[derive(Debug, Clone)]
pub struct CertFiles {
    /// The certificate, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

impl Ca {
    /// A new authority. Its certificate is `ca.crt` in `folder`, where what it signs goes too.
    pub fn new(folder: &Path, name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(name, None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate().context("certificates", name)?;
        let certificate = params.self_signed(&key).context("certificates", name)?;
        let cert = folder.join("ca.crt");
        write_private(&cert, certificate.pem().as_bytes())
            .context("certificates", cert.display())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            folder: folder.to_path_buf(),
            cert,
        })
    }

    /// The authority's certificate.
    pub fn cert(&self) -> &Path {
        &self.cert
    }

    /// A certificate for a server on 127.0.0.1, `localhost` and the given addresses.
    pub fn server(&self, file: &str, extra: &[IpAddr]) -> Result<CertFiles> {
        self.server_named(file, &[], extra)
    }

    /// The same, also under the given host names.
    pub fn server_named(&self, file: &str, names: &[&str], extra: &[IpAddr]) -> Result<CertFiles> {
        let names = ["localhost", "127.0.0.1", "::1"].iter().chain(names);
        let names: Vec<String> = names.map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).context("certificates", file)?;
        params
            .subject_alt_names
            .extend(extra.iter().copied().map(SanType::IpAddress));
        // Also a client: etcd's own gateway connects to itself with its server certificate.
        let usages = [
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.issue(file, params, subject(file, None), &usages)
    }

    /// A certificate for a client: `name` is the user, `organization` the group (in Kubernetes).
    ///
    /// A file that is there already is replaced in one step, as a rotation does.
    pub fn client(&self, file: &str, name: &str, organization: Option<&str>) -> Result<CertFiles> {
        let params = CertificateParams::default();
        self.issue(
            file,
            params,
            subject(name, organization),
            &[ExtendedKeyUsagePurpose::ClientAuth],
        )
    }

    fn issue(
        &self,
        file: &str,
        mut params: CertificateParams,
        name: DistinguishedName,
        usages: &[ExtendedKeyUsagePurpose],
    ) -> Result<CertFiles> {
        params.distinguished_name = name;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = usages.to_vec();
        let key = KeyPair::generate().context("certificates", file)?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .context("certificates", file)?;
        let files = CertFiles {
            cert: self.folder.join(format!("{file}.crt")),
            key: self.folder.join(format!("{file}.key")),
        };
        write_private(&files.cert, certificate.pem().as_bytes()).context("certificates", file)?;
        write_private(&files.key, key.serialize_pem().as_bytes()).context("certificates", file)?;
        Ok(files)
    }
}

/// A key pair for signing tokens: the files of the private and of the public key.
pub(crate) fn signing_key(folder: &Path, file: &str) -> Result<(PathBuf, PathBuf)> {
    let pair = KeyPair::generate().context("certificates", file)?;
    let private = folder.join(format!("{file}.key"));
    let public = folder.join(format!("{file}.pub"));
    write_private(&private, pair.serialize_pem().as_bytes()).context("certificates", file)?;
    write_private(&public, pair.public_key_pem().as_bytes()).context("certificates", file)?;
    Ok((private, public))
}

fn subject(name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject
}
