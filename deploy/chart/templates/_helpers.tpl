{{/* The name of everything: that of the release, with the chart's in it. */}}
{{- define "etcd-registrar.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "etcd-registrar.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "etcd-registrar.labels" -}}
{{ include "etcd-registrar.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "etcd-registrar.serviceAccount" -}}
{{- default (include "etcd-registrar.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "etcd-registrar.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* The flags for etcd, as variables. */}}
{{- define "etcd-registrar.etcd" -}}
- name: ETCD_REGISTRAR_CLUSTER_NAME
  value: {{ required "clusterName is needed: the name of this cluster in etcd, e.g. --set clusterName=east" .Values.clusterName | quote }}
- name: ETCD_REGISTRAR_ETCD_ENDPOINTS
  value: {{ required "etcd.endpoints is needed: the URLs of etcd, e.g. --set 'etcd.endpoints={http://etcd.etcd.svc:2379}'" (join "," .Values.etcd.endpoints) | quote }}
- name: ETCD_REGISTRAR_REGISTRAR_PREFIX
  value: {{ .Values.etcd.registrarPrefix | quote }}
{{- with .Values.etcd.tls }}
{{- if .secret }}
- name: ETCD_REGISTRAR_ETCD_CACERT
  value: /etc/etcd-registrar/tls/{{ .caKey }}
{{- if .certKey }}
- name: ETCD_REGISTRAR_ETCD_CERT
  value: /etc/etcd-registrar/tls/{{ .certKey }}
- name: ETCD_REGISTRAR_ETCD_KEY
  value: /etc/etcd-registrar/tls/{{ .keyKey }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.etcd.auth }}
{{- if .user }}
- name: ETCD_REGISTRAR_ETCD_USER
  value: {{ .user | quote }}
- name: ETCD_REGISTRAR_ETCD_PASSWORD_FILE
  value: /etc/etcd-registrar/auth/{{ .passwordKey }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "etcd-registrar.mounts" -}}
{{- if .Values.etcd.tls.secret }}
- name: tls
  mountPath: /etc/etcd-registrar/tls
  readOnly: true
{{- end }}
{{- if .Values.etcd.auth.user }}
- name: auth
  mountPath: /etc/etcd-registrar/auth
  readOnly: true
{{- end }}
{{- end -}}

{{/* Mounted as folders, not as single files, so that changes arrive without a restart. */}}
{{- define "etcd-registrar.volumes" -}}
{{- if .Values.etcd.tls.secret }}
- name: tls
  secret:
    secretName: {{ .Values.etcd.tls.secret }}
    # 0440
    defaultMode: 288
{{- end }}
{{- if .Values.etcd.auth.user }}
- name: auth
  secret:
    secretName: {{ .Values.etcd.auth.secret }}
    # 0440
    defaultMode: 288
{{- end }}
{{- end -}}

{{- define "etcd-registrar.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
# So that the files of a Secret with mode 0440 can be read.
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "etcd-registrar.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
