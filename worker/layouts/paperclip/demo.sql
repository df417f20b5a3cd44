-- What the catalogue does not say of the released schema (2026.916.1) and honest behaviour needs: defaults, keys,
-- indexes and checks of the logs that are pruned and of the tables they stand on. Left out: the partial unique
-- indexes of issues (issues_active_*) and the triggers, which no job and no seeded row comes near.

SET LOCAL client_min_messages = warning;

-- In the release every uuid `id` has this default, and so has every obligatory time stamp but the auth tables'.
DO $$
DECLARE
  place record;
BEGIN
  FOR place IN
    SELECT attrelid::regclass AS relation, attname AS name, atttypid = 'uuid'::regtype AS is_id
    FROM pg_attribute
    JOIN pg_class ON pg_class.oid = attrelid AND relkind = 'r' AND relnamespace = 'public'::regnamespace
    WHERE attname = 'id' AND atttypid = 'uuid'::regtype
       OR attname IN ('created_at', 'updated_at') AND attnotnull AND relname NOT IN ('user', 'session', 'account')
  LOOP
    EXECUTE format('ALTER TABLE %s ALTER %I SET DEFAULT %s', place.relation, place.name,
                   CASE WHEN place.is_id THEN 'gen_random_uuid()' ELSE 'now()' END);
  END LOOP;
END $$;

CREATE SEQUENCE heartbeat_run_events_id_seq OWNED BY heartbeat_run_events.id;
CREATE SEQUENCE chat_telegram_draft_ids;
ALTER TABLE heartbeat_run_events ALTER id SET DEFAULT nextval('heartbeat_run_events_id_seq');

-- The release requires pg_trgm; a stand-in does without where the server lacks it.
DO $$
BEGIN
  IF EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_trgm') THEN
    CREATE EXTENSION IF NOT EXISTS pg_trgm;
    CREATE INDEX issues_title_search_idx ON issues USING gin (title gin_trgm_ops);
    CREATE INDEX issues_identifier_search_idx ON issues USING gin (identifier gin_trgm_ops);
    CREATE INDEX issues_description_search_idx ON issues USING gin (description gin_trgm_ops);
    CREATE INDEX issue_comments_body_search_idx ON issue_comments USING gin (body gin_trgm_ops);
  END IF;
END $$;

ALTER TABLE companies
  ALTER status SET DEFAULT 'active', ALTER budget_monthly_cents SET DEFAULT 0,
  ALTER spent_monthly_cents SET DEFAULT 0, ALTER issue_prefix SET DEFAULT 'PAP', ALTER issue_counter SET DEFAULT 0,
  ALTER require_board_approval_for_new_agents SET DEFAULT false,
  ALTER feedback_data_sharing_enabled SET DEFAULT false, ALTER interaction_resolver_governance SET DEFAULT '{}';
CREATE INDEX companies_default_responsible_user_idx ON companies (default_responsible_user_id);
CREATE UNIQUE INDEX companies_issue_prefix_idx ON companies (issue_prefix);

ALTER TABLE agents
  ALTER role SET DEFAULT 'general', ALTER status SET DEFAULT 'idle', ALTER adapter_type SET DEFAULT 'process',
  ALTER adapter_config SET DEFAULT '{}', ALTER budget_monthly_cents SET DEFAULT 0,
  ALTER spent_monthly_cents SET DEFAULT 0, ALTER runtime_config SET DEFAULT '{}',
  ALTER permissions SET DEFAULT '{}', ADD CONSTRAINT agents_company_id_uq UNIQUE (company_id, id),
  ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (default_environment_id) REFERENCES environments ON DELETE SET NULL,
  ADD FOREIGN KEY (reports_to) REFERENCES agents;
CREATE UNIQUE INDEX agents_company_built_in_agent_key_unique_idx
  ON agents (company_id, (metadata -> 'paperclipBuiltInAgent' ->> 'key'))
  WHERE metadata -> 'paperclipBuiltInAgent' ->> 'key' IS NOT NULL AND status <> 'terminated';
CREATE INDEX agents_company_default_environment_idx ON agents (company_id, default_environment_id);
CREATE INDEX agents_company_reports_to_idx ON agents (company_id, reports_to);
CREATE INDEX agents_company_status_idx ON agents (company_id, status);

ALTER TABLE issues
  ALTER status SET DEFAULT 'backlog', ALTER priority SET DEFAULT 'medium', ALTER request_depth SET DEFAULT 0,
  ALTER origin_kind SET DEFAULT 'manual', ALTER origin_fingerprint SET DEFAULT 'default',
  ALTER monitor_attempt_count SET DEFAULT 0, ALTER work_mode SET DEFAULT 'standard',
  ALTER status_version SET DEFAULT 0, ALTER conversation_session_generation SET DEFAULT 0,
  ADD FOREIGN KEY (assignee_agent_id) REFERENCES agents,
  ADD FOREIGN KEY (checkout_run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (conversation_agent_id) REFERENCES agents,
  ADD FOREIGN KEY (created_by_agent_id) REFERENCES agents,
  ADD FOREIGN KEY (execution_run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (execution_workspace_id) REFERENCES execution_workspaces ON DELETE SET NULL,
  ADD FOREIGN KEY (goal_id) REFERENCES goals, ADD FOREIGN KEY (parent_id) REFERENCES issues,
  ADD FOREIGN KEY (project_id) REFERENCES projects,
  ADD FOREIGN KEY (project_workspace_id) REFERENCES project_workspaces ON DELETE SET NULL,
  ADD CONSTRAINT issues_conversation_identity_check CHECK (
    (conversation_agent_id IS NULL AND conversation_user_id IS NULL AND conversation_state IS NULL)
    OR (conversation_agent_id IS NOT NULL AND conversation_user_id IS NOT NULL AND conversation_state IS NOT NULL
      AND assignee_agent_id IS NOT NULL AND assignee_agent_id = conversation_agent_id
      AND assignee_user_id IS NULL AND conversation_state IN ('active', 'waiting')
      AND status NOT IN ('done', 'cancelled')));
CREATE INDEX issues_company_assignee_status_idx ON issues (company_id, assignee_agent_id, status);
CREATE INDEX issues_company_assignee_user_status_idx ON issues (company_id, assignee_user_id, status);
CREATE INDEX issues_company_created_idx ON issues (company_id, created_at);
CREATE INDEX issues_company_execution_workspace_idx ON issues (company_id, execution_workspace_id);
CREATE INDEX issues_company_harness_kind_idx ON issues (company_id, harness_kind);
CREATE UNIQUE INDEX issues_company_id_uq ON issues (company_id, id);
CREATE INDEX issues_company_monitor_due_idx ON issues (company_id, monitor_next_check_at);
CREATE INDEX issues_company_origin_idx ON issues (company_id, origin_kind, origin_id);
CREATE INDEX issues_company_parent_idx ON issues (company_id, parent_id);
CREATE INDEX issues_company_priority_idx ON issues (company_id, priority);
CREATE INDEX issues_company_project_idx ON issues (company_id, project_id);
CREATE INDEX issues_company_project_workspace_idx ON issues (company_id, project_workspace_id);
CREATE INDEX issues_company_responsible_user_idx ON issues (company_id, responsible_user_id);
CREATE INDEX issues_company_status_idx ON issues (company_id, status);
CREATE INDEX issues_company_updated_idx ON issues (company_id, updated_at);
CREATE UNIQUE INDEX issues_conversation_identity_idx
  ON issues (company_id, conversation_agent_id, conversation_user_id);
CREATE UNIQUE INDEX issues_identifier_idx ON issues (identifier);
CREATE UNIQUE INDEX issues_onboarding_first_task_uq ON issues (company_id)
  WHERE origin_kind = 'onboarding_first_task';
CREATE INDEX issues_open_normalized_title_created_idx ON issues
  (company_id, parent_id, lower(regexp_replace(btrim(title), '\s+', ' ', 'g')), created_at)
  WHERE hidden_at IS NULL AND status NOT IN ('done', 'cancelled');
CREATE UNIQUE INDEX issues_open_routine_execution_uq
  ON issues (company_id, origin_kind, origin_id, origin_fingerprint)
  WHERE origin_kind = 'routine_execution' AND origin_id IS NOT NULL AND hidden_at IS NULL
    AND execution_run_id IS NOT NULL AND status IN ('backlog', 'todo', 'in_progress', 'in_review', 'blocked');

ALTER TABLE issue_comments
  ADD CONSTRAINT issue_comments_client_request_uq UNIQUE (issue_id, author_user_id, client_request_id),
  ADD CONSTRAINT issue_comments_company_id_uq UNIQUE (company_id, id),
  ADD FOREIGN KEY (author_agent_id) REFERENCES agents, ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (created_by_run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (deleted_by_agent_id) REFERENCES agents ON DELETE SET NULL,
  ADD FOREIGN KEY (deleted_by_run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (derived_author_agent_id) REFERENCES agents ON DELETE SET NULL,
  ADD FOREIGN KEY (derived_created_by_run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE,
  ADD FOREIGN KEY (on_behalf_of_user_id) REFERENCES "user" ON DELETE SET NULL;
CREATE INDEX issue_comments_company_author_issue_created_at_idx
  ON issue_comments (company_id, author_user_id, issue_id, created_at);
CREATE INDEX issue_comments_company_idx ON issue_comments (company_id);
CREATE INDEX issue_comments_company_issue_created_at_idx ON issue_comments (company_id, issue_id, created_at);
CREATE INDEX issue_comments_issue_idx ON issue_comments (issue_id);

ALTER TABLE issue_relations
  ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (created_by_agent_id) REFERENCES agents ON DELETE SET NULL,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE,
  ADD FOREIGN KEY (related_issue_id) REFERENCES issues ON DELETE CASCADE,
  ADD CONSTRAINT issue_relations_type_check CHECK (type = 'blocks');
CREATE UNIQUE INDEX issue_relations_company_edge_uq
  ON issue_relations (company_id, issue_id, related_issue_id, type);
CREATE INDEX issue_relations_company_issue_idx ON issue_relations (company_id, issue_id);
CREATE INDEX issue_relations_company_related_issue_idx ON issue_relations (company_id, related_issue_id);
CREATE INDEX issue_relations_company_type_idx ON issue_relations (company_id, type);

ALTER TABLE heartbeat_runs
  ALTER invocation_source SET DEFAULT 'on_demand', ALTER status SET DEFAULT 'queued',
  ALTER log_compressed SET DEFAULT false, ALTER process_loss_retry_count SET DEFAULT 0,
  ALTER issue_comment_status SET DEFAULT 'not_applicable', ALTER continuation_attempt SET DEFAULT 0,
  ALTER scheduled_retry_attempt SET DEFAULT 0, ALTER last_output_seq SET DEFAULT 0,
  ALTER runtime_mode SET DEFAULT 'legacy', ALTER next_event_seq SET DEFAULT 1,
  ADD FOREIGN KEY (agent_id) REFERENCES agents, ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (retry_of_run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (wakeup_request_id) REFERENCES agent_wakeup_requests;
CREATE INDEX heartbeat_runs_company_agent_started_idx ON heartbeat_runs (company_id, agent_id, started_at);
CREATE INDEX heartbeat_runs_company_created_at_desc_idx ON heartbeat_runs (company_id, created_at DESC);
CREATE INDEX heartbeat_runs_company_ctx_issue_created_idx
  ON heartbeat_runs (company_id, (context_snapshot ->> 'issueId'), created_at DESC);
CREATE INDEX heartbeat_runs_company_ctx_task_created_idx
  ON heartbeat_runs (company_id, (context_snapshot ->> 'taskId'), created_at DESC);
CREATE INDEX heartbeat_runs_company_ctx_taskkey_created_idx
  ON heartbeat_runs (company_id, (context_snapshot ->> 'taskKey'), created_at DESC);
CREATE INDEX heartbeat_runs_company_liveness_idx ON heartbeat_runs (company_id, liveness_state, created_at);
CREATE UNIQUE INDEX heartbeat_runs_company_native_issue_contract_id_uq
  ON heartbeat_runs (company_id, native_issue_id, id, completion_contract_id);
CREATE UNIQUE INDEX heartbeat_runs_company_native_issue_id_uq ON heartbeat_runs (company_id, native_issue_id, id);
CREATE INDEX heartbeat_runs_company_responsible_user_idx
  ON heartbeat_runs (company_id, responsible_user_id, created_at);
CREATE INDEX heartbeat_runs_company_status_last_output_idx ON heartbeat_runs (company_id, status, last_output_at);
CREATE INDEX heartbeat_runs_company_status_process_started_idx
  ON heartbeat_runs (company_id, status, process_started_at);
CREATE INDEX heartbeat_runs_execution_control_deadline_idx ON heartbeat_runs (execution_control_deadline_at)
  WHERE execution_control_deadline_at IS NOT NULL;
CREATE INDEX heartbeat_runs_execution_status_delivery_idx ON heartbeat_runs (execution_status_delivery_id)
  WHERE execution_status_delivery_id IS NOT NULL;
CREATE UNIQUE INDEX heartbeat_runs_native_replacement_predecessor_uq ON heartbeat_runs (company_id, retry_of_run_id)
  WHERE scheduled_retry_reason = 'native_safe_replacement';

ALTER TABLE "user"
  ALTER email_verified SET DEFAULT false;

ALTER TABLE account
  ADD FOREIGN KEY (user_id) REFERENCES "user" ON DELETE CASCADE;
CREATE UNIQUE INDEX account_issuer_account_id_uq ON account (issuer, account_id);

ALTER TABLE session
  ADD FOREIGN KEY (user_id) REFERENCES "user" ON DELETE CASCADE;

ALTER TABLE board_api_keys
  ADD FOREIGN KEY (user_id) REFERENCES "user" ON DELETE CASCADE;
CREATE UNIQUE INDEX board_api_keys_key_hash_idx ON board_api_keys (key_hash);
CREATE INDEX board_api_keys_user_idx ON board_api_keys (user_id);

ALTER TABLE cli_auth_challenges
  ALTER requested_access SET DEFAULT 'board',
  ADD FOREIGN KEY (approved_by_user_id) REFERENCES "user" ON DELETE SET NULL,
  ADD FOREIGN KEY (board_api_key_id) REFERENCES board_api_keys ON DELETE SET NULL,
  ADD FOREIGN KEY (requested_company_id) REFERENCES companies ON DELETE SET NULL;
CREATE INDEX cli_auth_challenges_approved_by_idx ON cli_auth_challenges (approved_by_user_id);
CREATE INDEX cli_auth_challenges_requested_company_idx ON cli_auth_challenges (requested_company_id);
CREATE INDEX cli_auth_challenges_secret_hash_idx ON cli_auth_challenges (secret_hash);

ALTER TABLE instance_user_roles
  ALTER role SET DEFAULT 'instance_admin';
CREATE INDEX instance_user_roles_role_idx ON instance_user_roles (role);
CREATE UNIQUE INDEX instance_user_roles_user_role_unique_idx ON instance_user_roles (user_id, role);

ALTER TABLE company_memberships
  ALTER status SET DEFAULT 'active', ADD FOREIGN KEY (company_id) REFERENCES companies;
CREATE UNIQUE INDEX company_memberships_company_principal_unique_idx
  ON company_memberships (company_id, principal_type, principal_id);
CREATE INDEX company_memberships_company_status_idx ON company_memberships (company_id, status);
CREATE INDEX company_memberships_principal_status_idx ON company_memberships (principal_type, principal_id, status);

ALTER TABLE agent_api_keys
  ADD FOREIGN KEY (agent_id) REFERENCES agents, ADD FOREIGN KEY (company_id) REFERENCES companies;
CREATE INDEX agent_api_keys_company_agent_idx ON agent_api_keys (company_id, agent_id);
CREATE INDEX agent_api_keys_key_hash_idx ON agent_api_keys (key_hash);

ALTER TABLE company_secrets
  ALTER provider SET DEFAULT 'local_encrypted', ALTER latest_version SET DEFAULT 1,
  ALTER status SET DEFAULT 'active', ALTER managed_mode SET DEFAULT 'paperclip_managed',
  ALTER scope SET DEFAULT 'company', ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (created_by_agent_id) REFERENCES agents ON DELETE SET NULL,
  ADD FOREIGN KEY (provider_config_id) REFERENCES company_secret_provider_configs ON DELETE SET NULL,
  ADD FOREIGN KEY (user_secret_definition_id) REFERENCES user_secret_definitions ON DELETE SET NULL,
  ADD CONSTRAINT company_secrets_scope_shape_check CHECK (
    (scope = 'company' AND owner_user_id IS NULL AND user_secret_definition_id IS NULL)
    OR (scope = 'user' AND owner_user_id IS NOT NULL AND user_secret_definition_id IS NOT NULL));
CREATE INDEX company_secrets_company_idx ON company_secrets (company_id);
CREATE UNIQUE INDEX company_secrets_company_key_uq ON company_secrets (company_id, key)
  WHERE scope = 'company' AND deleted_at IS NULL;
CREATE UNIQUE INDEX company_secrets_company_name_uq ON company_secrets (company_id, name)
  WHERE scope = 'company' AND deleted_at IS NULL;
CREATE INDEX company_secrets_company_owner_idx ON company_secrets (company_id, owner_user_id);
CREATE INDEX company_secrets_company_provider_idx ON company_secrets (company_id, provider);
CREATE INDEX company_secrets_company_scope_idx ON company_secrets (company_id, scope);
CREATE INDEX company_secrets_provider_config_idx ON company_secrets (provider_config_id);
CREATE INDEX company_secrets_user_definition_owner_idx
  ON company_secrets (company_id, user_secret_definition_id, owner_user_id);
CREATE UNIQUE INDEX company_secrets_user_definition_owner_uq
  ON company_secrets (company_id, user_secret_definition_id, owner_user_id)
  WHERE scope = 'user' AND deleted_at IS NULL;

ALTER TABLE company_secret_versions
  ALTER status SET DEFAULT 'current', ADD FOREIGN KEY (created_by_agent_id) REFERENCES agents ON DELETE SET NULL,
  ADD FOREIGN KEY (secret_id) REFERENCES company_secrets ON DELETE CASCADE;
CREATE INDEX company_secret_versions_fingerprint_idx ON company_secret_versions (fingerprint_sha256);
CREATE INDEX company_secret_versions_secret_idx ON company_secret_versions (secret_id, created_at);
CREATE UNIQUE INDEX company_secret_versions_secret_version_uq ON company_secret_versions (secret_id, version);
CREATE INDEX company_secret_versions_value_sha256_idx ON company_secret_versions (value_sha256);

ALTER TABLE activity_log
  ALTER actor_type SET DEFAULT 'system', ADD FOREIGN KEY (agent_id) REFERENCES agents,
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (run_id) REFERENCES heartbeat_runs;
CREATE INDEX activity_log_company_agent_created_idx ON activity_log (company_id, agent_id, created_at);
CREATE INDEX activity_log_company_created_idx ON activity_log (company_id, created_at);
CREATE INDEX activity_log_company_responsible_user_created_idx
  ON activity_log (company_id, responsible_user_id, created_at);
CREATE INDEX activity_log_entity_type_id_idx ON activity_log (entity_type, entity_id);
CREATE INDEX activity_log_run_id_idx ON activity_log (run_id);

ALTER TABLE heartbeat_run_events
  ADD FOREIGN KEY (agent_id) REFERENCES agents, ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (run_id) REFERENCES heartbeat_runs;
CREATE INDEX heartbeat_run_events_company_created_idx ON heartbeat_run_events (company_id, created_at);
CREATE INDEX heartbeat_run_events_company_run_idx ON heartbeat_run_events (company_id, run_id);
CREATE UNIQUE INDEX heartbeat_run_events_run_seq_uq ON heartbeat_run_events (run_id, seq);
CREATE UNIQUE INDEX heartbeat_run_events_run_source_event_uq ON heartbeat_run_events (run_id, source_event_id)
  WHERE source_event_id IS NOT NULL;
CREATE UNIQUE INDEX heartbeat_run_events_run_source_seq_uq
  ON heartbeat_run_events (run_id, source_instance_id, source_seq)
  WHERE source_instance_id IS NOT NULL AND source_seq IS NOT NULL;

ALTER TABLE secret_access_events
  ALTER secret_scope SET DEFAULT 'company', ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (heartbeat_run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE SET NULL,
  ADD FOREIGN KEY (plugin_id) REFERENCES plugins ON DELETE SET NULL,
  ADD FOREIGN KEY (secret_id) REFERENCES company_secrets ON DELETE CASCADE,
  ADD FOREIGN KEY (user_secret_definition_id) REFERENCES user_secret_definitions ON DELETE SET NULL;
CREATE INDEX secret_access_events_company_created_idx ON secret_access_events (company_id, created_at);
CREATE INDEX secret_access_events_company_credential_owner_idx
  ON secret_access_events (company_id, credential_owner_user_id, created_at);
CREATE INDEX secret_access_events_consumer_idx ON secret_access_events (company_id, consumer_type, consumer_id);
CREATE INDEX secret_access_events_run_idx ON secret_access_events (heartbeat_run_id);
CREATE INDEX secret_access_events_secret_created_idx ON secret_access_events (secret_id, created_at);
CREATE INDEX secret_access_events_user_definition_created_idx
  ON secret_access_events (user_secret_definition_id, created_at);

ALTER TABLE plugins
  ALTER api_version SET DEFAULT 1, ALTER categories SET DEFAULT '[]', ALTER status SET DEFAULT 'installed',
  ALTER installed_at SET DEFAULT now();
CREATE UNIQUE INDEX plugins_plugin_key_idx ON plugins (plugin_key);
CREATE INDEX plugins_status_idx ON plugins (status);

ALTER TABLE plugin_logs
  ALTER level SET DEFAULT 'info', ADD FOREIGN KEY (company_id) REFERENCES companies ON DELETE CASCADE,
  ADD FOREIGN KEY (plugin_id) REFERENCES plugins ON DELETE CASCADE;
CREATE INDEX plugin_logs_company_idx ON plugin_logs (company_id);
CREATE INDEX plugin_logs_level_idx ON plugin_logs (level);
CREATE INDEX plugin_logs_plugin_time_idx ON plugin_logs (plugin_id, created_at);

ALTER TABLE tool_applications
  ALTER status SET DEFAULT 'active', ALTER metadata SET DEFAULT '{}',
  ADD FOREIGN KEY (company_id) REFERENCES companies ON DELETE CASCADE,
  ADD FOREIGN KEY (owner_agent_id) REFERENCES agents ON DELETE SET NULL,
  ADD FOREIGN KEY (plugin_id) REFERENCES plugins ON DELETE SET NULL;
CREATE INDEX tool_applications_company_idx ON tool_applications (company_id);
CREATE UNIQUE INDEX tool_applications_company_key_uq ON tool_applications (company_id, application_key);
CREATE UNIQUE INDEX tool_applications_company_name_uq ON tool_applications (company_id, name);
CREATE INDEX tool_applications_company_status_idx ON tool_applications (company_id, status);

ALTER TABLE tool_connections
  ALTER status SET DEFAULT 'draft', ALTER enabled SET DEFAULT false, ALTER config SET DEFAULT '{}',
  ALTER credential_refs SET DEFAULT '[]', ALTER health_status SET DEFAULT 'unchecked',
  ALTER connection_kind SET DEFAULT 'managed', ALTER transport_config SET DEFAULT '{}',
  ALTER credential_secret_refs SET DEFAULT '[]', ALTER ownership SET DEFAULT 'customer',
  ALTER auth_kind SET DEFAULT 'none', ALTER credential_policy SET DEFAULT 'shared',
  ALTER credential_source SET DEFAULT 'paperclip_vault', ALTER connection_purpose SET DEFAULT 'tool',
  ADD CONSTRAINT tool_connections_company_id_uq UNIQUE (company_id, id),
  ADD FOREIGN KEY (application_id) REFERENCES tool_applications,
  ADD FOREIGN KEY (company_id) REFERENCES companies ON DELETE CASCADE,
  ADD FOREIGN KEY (created_by_agent_id) REFERENCES agents ON DELETE SET NULL;
CREATE INDEX tool_connections_application_idx ON tool_connections (application_id);
CREATE INDEX tool_connections_company_enabled_idx ON tool_connections (company_id, enabled);
CREATE INDEX tool_connections_company_idx ON tool_connections (company_id);
CREATE UNIQUE INDEX tool_connections_company_uid_uq ON tool_connections (company_id, uid);

ALTER TABLE tool_call_events
  ALTER actor_type SET DEFAULT 'system', ALTER matched_policy_ids SET DEFAULT '[]',
  ALTER outcome SET DEFAULT 'pending',
  ADD FOREIGN KEY (action_request_id) REFERENCES tool_action_requests ON DELETE SET NULL,
  ADD FOREIGN KEY (agent_id) REFERENCES agents ON DELETE SET NULL,
  ADD FOREIGN KEY (application_id) REFERENCES tool_applications ON DELETE SET NULL,
  ADD FOREIGN KEY (catalog_entry_id) REFERENCES tool_catalog_entries ON DELETE SET NULL,
  ADD FOREIGN KEY (company_id) REFERENCES companies ON DELETE CASCADE,
  ADD FOREIGN KEY (connection_id) REFERENCES tool_connections ON DELETE SET NULL,
  ADD FOREIGN KEY (gateway_id) REFERENCES tool_mcp_gateways ON DELETE SET NULL,
  ADD FOREIGN KEY (gateway_token_id) REFERENCES tool_mcp_gateway_tokens ON DELETE SET NULL,
  ADD FOREIGN KEY (invocation_id) REFERENCES tool_invocations ON DELETE SET NULL,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE SET NULL,
  ADD FOREIGN KEY (run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD FOREIGN KEY (runtime_slot_id) REFERENCES tool_runtime_slots ON DELETE SET NULL;
CREATE INDEX tool_call_events_company_created_idx ON tool_call_events (company_id, created_at);
CREATE INDEX tool_call_events_gateway_idx ON tool_call_events (company_id, gateway_id);
CREATE INDEX tool_call_events_invocation_idx ON tool_call_events (invocation_id);
CREATE INDEX tool_call_events_issue_idx ON tool_call_events (company_id, issue_id);
CREATE INDEX tool_call_events_run_idx ON tool_call_events (company_id, run_id);

ALTER TABLE tool_access_audit_events
  ALTER actor_type SET DEFAULT 'system', ALTER details SET DEFAULT '{}',
  ADD FOREIGN KEY (catalog_entry_id) REFERENCES tool_catalog_entries ON DELETE SET NULL,
  ADD FOREIGN KEY (company_id) REFERENCES companies ON DELETE CASCADE,
  ADD FOREIGN KEY (connection_id) REFERENCES tool_connections ON DELETE SET NULL,
  ADD FOREIGN KEY (gateway_id) REFERENCES tool_mcp_gateways ON DELETE SET NULL,
  ADD FOREIGN KEY (gateway_token_id) REFERENCES tool_mcp_gateway_tokens ON DELETE SET NULL;
CREATE INDEX tool_access_audit_company_created_idx ON tool_access_audit_events (company_id, created_at);
CREATE INDEX tool_access_audit_connection_idx ON tool_access_audit_events (connection_id);
CREATE INDEX tool_access_audit_gateway_idx ON tool_access_audit_events (company_id, gateway_id);

ALTER TABLE connection_token_issuances
  ALTER requested_scope SET DEFAULT '[]', ALTER issued_scope SET DEFAULT '[]', ALTER metadata SET DEFAULT '{}',
  ADD FOREIGN KEY (agent_id) REFERENCES agents ON DELETE CASCADE,
  ADD FOREIGN KEY (application_id) REFERENCES tool_applications ON DELETE SET NULL,
  ADD FOREIGN KEY (company_id) REFERENCES companies ON DELETE CASCADE,
  ADD FOREIGN KEY (connection_id) REFERENCES tool_connections ON DELETE CASCADE,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE SET NULL,
  ADD FOREIGN KEY (project_id) REFERENCES projects ON DELETE SET NULL,
  ADD FOREIGN KEY (run_id) REFERENCES heartbeat_runs ON DELETE SET NULL,
  ADD CONSTRAINT connection_token_issuances_outcome_check CHECK (outcome IN (
    'success', 'denied', 'rate_limited', 'use_env_lease', 'upstream_error', 'failure')),
  ADD CONSTRAINT connection_token_issuances_path_check CHECK (path IN ('exchange', 'oauth_access', 'static')),
  ADD CONSTRAINT connection_token_issuances_token_hash_format
    CHECK (token_hash IS NULL OR token_hash ~ '^[a-f0-9]{64}$'),
  ADD CONSTRAINT connection_token_issuances_ttl_bounds CHECK (ttl_seconds BETWEEN 1 AND 900);
CREATE INDEX connection_token_issuances_agent_connection_idx
  ON connection_token_issuances (company_id, agent_id, connection_id, created_at);
CREATE INDEX connection_token_issuances_company_created_idx ON connection_token_issuances (company_id, created_at);
CREATE INDEX connection_token_issuances_connection_created_idx
  ON connection_token_issuances (company_id, connection_id, created_at);
CREATE INDEX connection_token_issuances_run_idx ON connection_token_issuances (company_id, run_id);

ALTER TABLE tool_gateway_sessions
  ADD FOREIGN KEY (agent_id) REFERENCES agents ON DELETE CASCADE,
  ADD FOREIGN KEY (company_id) REFERENCES companies ON DELETE CASCADE,
  ADD FOREIGN KEY (gateway_id) REFERENCES tool_mcp_gateways ON DELETE SET NULL,
  ADD FOREIGN KEY (gateway_token_id) REFERENCES tool_mcp_gateway_tokens ON DELETE SET NULL,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE SET NULL,
  ADD FOREIGN KEY (project_id) REFERENCES projects ON DELETE SET NULL,
  ADD FOREIGN KEY (run_id) REFERENCES heartbeat_runs ON DELETE CASCADE;
CREATE INDEX tool_gateway_sessions_company_agent_idx ON tool_gateway_sessions (company_id, agent_id);
CREATE INDEX tool_gateway_sessions_company_expires_idx ON tool_gateway_sessions (company_id, expires_at);
CREATE INDEX tool_gateway_sessions_gateway_idx ON tool_gateway_sessions (company_id, gateway_id);
CREATE INDEX tool_gateway_sessions_issue_idx ON tool_gateway_sessions (company_id, issue_id);
CREATE INDEX tool_gateway_sessions_run_idx ON tool_gateway_sessions (company_id, run_id);
CREATE UNIQUE INDEX tool_gateway_sessions_token_hash_uq ON tool_gateway_sessions (token_hash);

ALTER TABLE decisions
  ALTER status SET DEFAULT 'open', ALTER continuation_policy SET DEFAULT 'none', ALTER metadata SET DEFAULT '{}',
  ADD FOREIGN KEY (bundle_id) REFERENCES decision_bundles ON DELETE SET NULL,
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (origin_agent_id) REFERENCES agents,
  ADD FOREIGN KEY (origin_issue_id) REFERENCES issues, ADD FOREIGN KEY (origin_run_id) REFERENCES heartbeat_runs;
CREATE INDEX decisions_bundle_idx ON decisions (bundle_id);
CREATE UNIQUE INDEX decisions_company_idempotency_uq ON decisions (company_id, idempotency_key)
  WHERE idempotency_key IS NOT NULL;
CREATE INDEX decisions_company_status_expires_at_idx ON decisions (company_id, status, expires_at);
CREATE INDEX decisions_origin_issue_idx ON decisions (origin_issue_id);

ALTER TABLE decision_effect_executions
  ALTER status SET DEFAULT 'claimed', ADD FOREIGN KEY (activity_log_id) REFERENCES activity_log ON DELETE SET NULL,
  ADD FOREIGN KEY (decision_id) REFERENCES decisions ON DELETE CASCADE,
  ADD FOREIGN KEY (target_issue_id) REFERENCES issues;
CREATE INDEX issue_thread_interactions_company_issue_status_idx
  ON issue_thread_interactions (company_id, issue_id, status);
ALTER TABLE issue_thread_interactions
  ALTER continuation_policy SET DEFAULT 'wake_assignee', ALTER requested_resolver_policy SET DEFAULT 'board_or_agents',
  ALTER effective_resolver_policy SET DEFAULT 'board_or_agents',
  ALTER resolver_policy_provenance SET DEFAULT 'requested',
  ALTER effective_resolver_policy_source SET DEFAULT 'requested', ALTER origin_comment_ids SET DEFAULT '[]',
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE;
ALTER TABLE approvals
  ALTER status SET DEFAULT 'pending', ADD FOREIGN KEY (company_id) REFERENCES companies;
ALTER TABLE issue_approvals
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE,
  ADD FOREIGN KEY (approval_id) REFERENCES approvals ON DELETE CASCADE;
CREATE INDEX issue_approvals_issue_idx ON issue_approvals (issue_id);
ALTER TABLE issue_tree_holds
  ALTER status SET DEFAULT 'active', ALTER created_by_actor_type SET DEFAULT 'system',
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (root_issue_id) REFERENCES issues ON DELETE CASCADE;
CREATE INDEX issue_tree_holds_company_root_status_idx ON issue_tree_holds (company_id, root_issue_id, status);
CREATE INDEX issue_recovery_actions_company_source_status_idx
  ON issue_recovery_actions (company_id, source_issue_id, status);
CREATE INDEX issue_recovery_actions_company_recovery_issue_idx
  ON issue_recovery_actions (company_id, recovery_issue_id);
ALTER TABLE issue_tree_hold_members
  ALTER depth SET DEFAULT 0, ALTER skipped SET DEFAULT false,
  ADD FOREIGN KEY (company_id) REFERENCES companies,
  ADD FOREIGN KEY (hold_id) REFERENCES issue_tree_holds ON DELETE CASCADE,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE;
CREATE INDEX issue_tree_hold_members_company_issue_idx ON issue_tree_hold_members (company_id, issue_id);
ALTER TABLE decision_target_issues
  ADD FOREIGN KEY (decision_id) REFERENCES decisions ON DELETE CASCADE,
  ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE;
CREATE INDEX decision_target_issues_issue_idx ON decision_target_issues (issue_id);
CREATE INDEX tool_action_requests_issue_idx ON tool_action_requests (company_id, issue_id);
CREATE UNIQUE INDEX decision_effect_executions_decision_effect_uq
  ON decision_effect_executions (decision_id, effect_index);
CREATE INDEX decision_effect_executions_target_issue_idx ON decision_effect_executions (target_issue_id);


-- rows ----
-- How much of everything is in demo.ask, which demo_schema.py makes. Not chance but a hash of the row decides.

CREATE VIEW demo.company AS
SELECT n, demo.id('company', n) AS id,
       demo.pick('{Northwind Robotics,Tåresund Maskin,Łódź Analytics,青空ソフト,Grüner Faden}', n) || ' ' || n AS name,
       demo.pick('{NOR,TAR,LOD,AOZ,GRU}', n) || n AS prefix
FROM demo.ask, generate_series(1::bigint, companies) AS n;

CREATE VIEW demo.person AS
SELECT n, demo.text_id('user', n) AS id, (n - 1) % companies + 1 AS company,
       demo.pick('{Zoë,Jürgen,Олена,Aroha,李,Renée,Tomás,Nkechi}', demo.dice(n, 1)) || ' ' ||
       demo.pick('{Ångström,Groß,Шевченко,Parata,小龙,O''Connor,Núñez,Okafor}', demo.dice(n, 2)) AS name,
       'person' || n || '@demo.example' AS email
FROM demo.ask, generate_series(1::bigint, companies * 8) AS n;

CREATE VIEW demo.event AS
SELECT n, n % companies + 1 AS c, start + span * ((n - 0.5::float8) / events) AS at
FROM demo.ask, generate_series(1::bigint, events) AS n;

INSERT INTO companies (id, name, description, status, issue_prefix, issue_counter, created_at, updated_at)
SELECT company.id, company.name, 'Everything that ' || company.name || ' makes — für alle.', 'active', prefix,
       issues_each, start, start
FROM demo.ask, demo.company;

INSERT INTO "user" (id, name, email, email_verified, created_at, updated_at)
SELECT person.id, person.name, email, true, start, start FROM demo.ask, demo.person;

INSERT INTO account (id, account_id, provider_id, issuer, user_id, password, created_at, updated_at)
SELECT demo.text_id('account', person.n), person.id, 'credential', 'local:credential', person.id,
       md5('salt' || person.n) || ':' || md5('password' || person.n), start, start
FROM demo.ask, demo.person;

INSERT INTO instance_user_roles (id, user_id, role, created_at, updated_at)
SELECT demo.id('role', person.n), person.id, 'instance_admin', start, start
FROM demo.ask, demo.person WHERE person.n = 1;

INSERT INTO company_memberships (id, company_id, principal_type, principal_id, status, membership_role, created_at,
                                 updated_at)
SELECT demo.id('membership', person.n), demo.id('company', company), 'user', person.id, 'active',
       CASE WHEN person.n <= companies THEN 'owner' ELSE 'member' END, start, start
FROM demo.ask, demo.person;

-- A session lives 7 days; of 12 over the whole time the last one still does.
INSERT INTO session (id, expires_at, token, created_at, updated_at, ip_address, user_agent, user_id)
SELECT demo.text_id('session', person.n * 100 + k), at + interval '7 days', demo.text_id('token', person.n * 100 + k),
       at, at, '203.0.113.' || demo.dice(person.n, 3) % 250, 'Mozilla/5.0 (X11; Linux x86_64)', person.id
FROM demo.ask, demo.person, generate_series(1, 12) AS k, LATERAL (SELECT start + span * (k / 12.0)) AS moment (at);

INSERT INTO verification (id, identifier, value, expires_at, created_at, updated_at)
SELECT demo.text_id('verification', k), 'reset-password:' || k, md5('code' || k), at + interval '1 hour', at, at
FROM demo.ask, generate_series(1, 200) AS k, LATERAL (SELECT start + span * least(1, k / 190.0)) AS moment (at);

INSERT INTO cli_auth_challenges (id, secret_hash, command, client_name, pending_key_hash, pending_key_name,
                                 expires_at, created_at, updated_at)
SELECT demo.id('challenge', k), md5('a' || k) || md5('b' || k), 'login', 'laptop ' || k,
       md5('c' || k) || md5('d' || k), 'CLI on laptop ' || k, at + interval '10 minutes', at, at
FROM demo.ask, generate_series(1, 200) AS k, LATERAL (SELECT start + span * least(1, k / 190.0)) AS moment (at);

INSERT INTO agents (id, company_id, name, role, title, status, adapter_type, adapter_config, runtime_config,
                    created_at, updated_at)
SELECT demo.id('agent', company.n * 100 + j), company.id, 'agent ' || j, demo.pick('{ceo,engineer,qa,general}', j),
       'Agent № ' || j, demo.pick('{idle,running,paused,idle}', j), 'process',
       jsonb_build_object('command', 'run', 'env', jsonb_build_object('LOG_LEVEL', 'info', 'REGION', 'eu-north')),
       jsonb_build_object('heartbeat', jsonb_build_object('enabled', true, 'intervalSec', 300)), start, start
FROM demo.ask, demo.company, generate_series(1, 8) AS j;

INSERT INTO agent_api_keys (id, agent_id, company_id, name, key_hash, revoked_at, created_at)
SELECT demo.id('key', company.n * 100 + j), demo.id('agent', company.n * 100 + j), company.id, 'default',
       md5('e' || company.n || j) || md5('f' || company.n || j), CASE WHEN j = 8 THEN now END, start
FROM demo.ask, demo.company, generate_series(1, 8) AS j;

-- References only: a ciphertext that no master key opens would be a lie.
INSERT INTO company_secrets (id, company_id, name, key, provider, managed_mode, external_ref, created_at, updated_at)
SELECT demo.id('secret', company.n * 100 + j), company.id, 'Service key ' || j, 'SERVICE_' || j || '_KEY',
       'aws_secrets_manager', 'external_reference', 'demo/service-' || j, start, start
FROM demo.ask, demo.company, generate_series(1, 5) AS j;

INSERT INTO plugins (id, plugin_key, package_name, version, manifest_json, installed_at, updated_at)
SELECT demo.id('plugin', j), 'demo.plugin-' || j, '@demo/plugin-' || j, '1.0.' || j, '{"capabilities": []}',
       start, start
FROM demo.ask, generate_series(1, 2) AS j;

INSERT INTO tool_applications (id, company_id, name, type, created_at, updated_at)
SELECT demo.id('application', company.n), company.id, 'Calendar', 'mcp_http', start, start
FROM demo.ask, demo.company;

INSERT INTO tool_connections (id, company_id, application_id, name, transport, uid, status, enabled, created_at,
                              updated_at)
SELECT demo.id('connection', company.n), company.id, demo.id('application', company.n), 'Calendar', 'mcp_remote',
       'calendar', 'active', true, start, start
FROM demo.ask, demo.company;

-- What is old is mostly done; of what is recent much is open.
INSERT INTO issues (id, company_id, title, description, status, priority, issue_number, identifier, assignee_agent_id,
                    created_by_user_id, responsible_user_id, parent_id, hidden_at, completed_at, cancelled_at,
                    created_at, updated_at)
SELECT demo.id('issue', company.n * 10000000 + k), company.id,
       demo.pick('{Fix,Review,Ship,Überprüfe,Plan,Translate,整理}', dice) || ' ' ||
       demo.pick('{the invoice run,die Lieferung,façade cleanup,顧客リスト,the login page,Łódź roll-out}', dice / 8),
       demo.words(k, 90 + dice % 300), status, demo.pick('{low,medium,high,urgent}', dice), k, prefix || '-' || k,
       demo.id('agent', company.n * 100 + dice % 8 + 1), demo.text_id('user', company.n),
       demo.text_id('user', company.n),
       CASE WHEN k % 10 = 3 THEN demo.id('issue', company.n * 10000000 + k - 1) END,
       CASE WHEN dice % 17 = 0 AND status IN ('done', 'cancelled') THEN ended + (now - ended) / 2 END,
       CASE WHEN status = 'done' THEN ended END, CASE WHEN status = 'cancelled' THEN ended END,
       at, CASE WHEN status IN ('done', 'cancelled') THEN ended ELSE at + (now - at) / 3 END
FROM demo.ask, demo.company, generate_series(1, issues_each) AS k,
     LATERAL (SELECT demo.dice(company.n * 10000000 + k, 4)) AS chance (dice),
     LATERAL (SELECT start + span * ((k - 0.5) / issues_each)) AS moment (at),
     LATERAL (SELECT at + (now - at) * (dice % 50) / 100) AS finish (ended),
     LATERAL (SELECT CASE WHEN dice / 64 % 100 < CASE WHEN k > 0.85 * issues_each THEN 45 ELSE 4 END
                          THEN demo.pick('{backlog,todo,in_progress,in_review,blocked}', dice)
                          WHEN dice % 9 = 0 THEN 'cancelled' ELSE 'done' END) AS state (status);

INSERT INTO issue_comments (id, company_id, issue_id, author_user_id, body, created_at, updated_at)
SELECT demo.id('comment', company.n * 10000000 + k), company.id, demo.id('issue', company.n * 10000000 + k),
       demo.text_id('user', company.n), demo.words(k * 7, 120), at + interval '1 hour', at + interval '1 hour'
FROM demo.ask, demo.company, generate_series(1, issues_each, 2) AS k,
     LATERAL (SELECT start + span * ((k - 0.5) / issues_each)) AS moment (at);

-- The last runs of a company are under way, and a few old ones hang.
INSERT INTO heartbeat_runs (id, company_id, agent_id, invocation_source, status, started_at, finished_at, exit_code,
                            context_snapshot, result_json, usage_json, stdout_excerpt, responsible_user_id,
                            next_event_seq, created_at, updated_at)
SELECT demo.id('run', company.n * 10000000 + r), company.id, demo.id('agent', company.n * 100 + dice % 8 + 1),
       demo.pick('{timer,assignment,on_demand}', dice), status, CASE WHEN status <> 'queued' THEN at END,
       CASE WHEN ended THEN at + interval '90 seconds' END,
       CASE status WHEN 'succeeded' THEN 0 WHEN 'failed' THEN 1 END,
       jsonb_build_object('issueId', demo.id('issue', company.n * 10000000 + 1 + (r - 1) * issues_each / runs_each),
                          'taskKey', 'task-' || r),
       CASE WHEN ended THEN jsonb_build_object('summary', demo.words(r, 80)) END,
       CASE WHEN ended THEN jsonb_build_object('inputTokens', dice % 9000, 'outputTokens', dice % 700) END,
       demo.words(r * 3, 160), demo.text_id('user', company.n), events_each + 1, at, at
FROM demo.ask, generate_series(1, runs_each) AS r, demo.company,
     LATERAL (SELECT demo.dice(company.n * 10000000 + r, 5)) AS chance (dice),
     LATERAL (SELECT start + span * ((r - 0.5) / runs_each)) AS moment (at),
     LATERAL (SELECT CASE WHEN r > runs_each - 4 THEN demo.pick('{queued,running,running,scheduled_retry}', r)
                          WHEN r % 200 = 20 THEN 'running'
                          WHEN dice % 10 < 7 THEN 'succeeded'
                          ELSE demo.pick('{failed,cancelled,timed_out,interrupted}', dice) END) AS state (status),
     LATERAL (SELECT status NOT IN ('queued', 'running', 'scheduled_retry')) AS fate (ended);

-- In the order of time, the companies mixed, as an application appends it.
INSERT INTO activity_log (id, company_id, actor_type, actor_id, action, entity_type, entity_id, agent_id, run_id,
                          responsible_user_id, details, created_at)
SELECT demo.id('activity', n), demo.id('company', c), actor,
       CASE actor WHEN 'user' THEN demo.text_id('user', c + dice / 1024 % 8 * companies)
                  WHEN 'agent' THEN agent::text ELSE 'system' END,
       CASE WHEN on_issue THEN demo.pick('{issue.updated,issue.comment_added,issue.updated,issue.created,
         issue.checked_out,issue.attachment_added,issue.successful_run_handoff_required}', dice / 2)
         ELSE demo.pick('{heartbeat.invoked,agent.hire_created,tool_gateway.call_completed,secret.value.read,
         company.updated,approval.created,board_api_key.created,agent.updated}', kind) END,
       CASE WHEN on_issue THEN 'issue' ELSE demo.pick(
         '{heartbeat_run,agent,tool_connection,secret,company,approval,board_api_key,agent}', kind) END,
       CASE WHEN on_issue THEN demo.id('issue', c * 10000000 + k)
            WHEN kind % 8 = 0 THEN run
            WHEN kind % 8 IN (1, 7) THEN agent
            WHEN kind % 8 = 2 THEN demo.id('connection', c)
            WHEN kind % 8 = 3 THEN demo.id('secret', c * 100 + kind % 5 + 1)
            WHEN kind % 8 = 4 THEN demo.id('company', c)
            ELSE demo.id('thing', n) END::text,
       CASE actor WHEN 'agent' THEN agent END, CASE dice / 8 % 2 WHEN 0 THEN run END, demo.text_id('user', c),
       -- As text: building it with functions takes three times as long.
       CASE WHEN on_issue
         THEN '{"issueNumber": ' || k || ', "changes": {"status": {"from": "todo", "to": "in_progress"}}'
              || ', "bodySnippet": "' || demo.words(n, dice / 16 % 200) || '"}'
         ELSE '{"source": "api", "context": {"attempt": ' || dice % 3 || ', "tags": ["π", "größe"]}, "note": "'
              || demo.words(n, 30 + dice / 16 % 160) || '"}' END::jsonb,
       at
FROM demo.ask, generate_series(1, rows) AS n,
     LATERAL (SELECT demo.dice(n, 6), start + span * ((n - 0.5::float8) / rows)) AS chance (dice, at),
     LATERAL (SELECT greatest(1, dice % (companies + 1)), dice / 32 % 2 = 0, dice / 128,
                     demo.pick('{user,agent,agent,system}', dice / 64)) AS one (c, on_issue, kind, actor),
     LATERAL (SELECT greatest(1, ceil((n - 0.5::float8) / rows * issues_each)::int - dice / 512 % 20),
                     greatest(1, ceil((n - 0.5::float8) / rows * runs_each)::int - dice / 512 % 5)) AS near (k, r),
     LATERAL (SELECT demo.id('agent', c * 100 + dice / 256 % 8 + 1), demo.id('run', c * 10000000 + r))
       AS link (agent, run);

INSERT INTO heartbeat_run_events (company_id, run_id, agent_id, seq, event_type, stream, level, message,
                                  payload, created_at)
SELECT run.company_id, run.id, run.agent_id, seq, demo.pick('{lifecycle,output,tool_call,output}', seq),
       demo.pick('{system,stdout,stderr}', seq), 'info', demo.words(e, 60),
       jsonb_build_object('step', seq, 'text', demo.words(e, 40)), run.created_at + seq * interval '2 seconds'
FROM demo.ask, generate_series(1, greatest(1, rows / 4)) AS e,
     LATERAL (SELECT (e - 1) / events_each, (e - 1) % events_each + 1) AS place (i, seq), heartbeat_runs AS run
WHERE run.id = demo.id('run', (i % companies + 1) * 10000000::bigint + i / companies + 1)
ORDER BY e;

INSERT INTO secret_access_events (id, company_id, secret_id, version, provider, actor_type, actor_id, consumer_type,
                                  consumer_id, heartbeat_run_id, outcome, created_at)
SELECT demo.id('access', n), demo.id('company', c), demo.id('secret', c * 100 + n % 5 + 1), 1, 'aws_secrets_manager',
       'agent', demo.id('agent', c * 100 + n % 8 + 1), 'agent', demo.id('agent', c * 100 + n % 8 + 1),
       demo.id('run', c * 10000000 + ceil((n - 0.5::float8) / events * runs_each)::int),
       demo.pick('{success,success,success,failure}', n), at
FROM demo.ask, demo.event;

INSERT INTO plugin_logs (id, plugin_id, company_id, level, message, meta, created_at)
SELECT demo.id('log', n), demo.id('plugin', n % 2 + 1), CASE WHEN n % 3 > 0 THEN demo.id('company', c) END,
       demo.pick('{info,debug,warn,error}', n), demo.words(n, 70),
       jsonb_build_object('job', 'sync', 'took', n % 900), at
FROM demo.ask, demo.event;

INSERT INTO tool_call_events (id, company_id, event_type, actor_type, actor_id, agent_id, run_id, application_id,
                              connection_id, tool_name, decision, outcome, latency_ms, arguments_summary, created_at)
SELECT demo.id('call', n), demo.id('company', c), 'call', 'agent', demo.id('agent', c * 100 + n % 8 + 1),
       demo.id('agent', c * 100 + n % 8 + 1),
       demo.id('run', c * 10000000 + ceil((n - 0.5::float8) / events * runs_each)::int),
       demo.id('application', c), demo.id('connection', c), demo.pick('{list_events,create_event}', n), 'allow',
       demo.pick('{success,success,error}', n), n % 4000, jsonb_build_object('title', demo.words(n, 40)), at
FROM demo.ask, demo.event;

INSERT INTO tool_access_audit_events (id, company_id, connection_id, actor_type, actor_id, action, outcome,
                                      details, created_at)
SELECT demo.id('audit', n), demo.id('company', c), demo.id('connection', c), 'user', demo.text_id('user', c),
       demo.pick('{connection.updated,policy.updated}', n), 'success',
       jsonb_build_object('note', demo.words(n, 30)), at
FROM demo.ask, demo.event;

INSERT INTO connection_token_issuances (id, company_id, application_id, connection_id, agent_id, run_id,
                                        responsible_user_id, path, ttl_seconds, expires_at, token_hash, outcome,
                                        created_at)
SELECT demo.id('issuance', n), demo.id('company', c), demo.id('application', c), demo.id('connection', c),
       demo.id('agent', c * 100 + n % 8 + 1),
       demo.id('run', c * 10000000 + ceil((n - 0.5::float8) / events * runs_each)::int), demo.text_id('user', c),
       demo.pick('{exchange,oauth_access,static}', n), 600, at + interval '10 minutes',
       md5('g' || n) || md5('h' || n), demo.pick('{success,success,denied}', n), at
FROM demo.ask, demo.event;

INSERT INTO tool_gateway_sessions (id, company_id, agent_id, run_id, token_hash, expires_at, last_used_at, created_at,
                                   updated_at)
SELECT demo.id('gateway session', n), demo.id('company', c), demo.id('agent', c * 100 + n % 8 + 1),
       demo.id('run', c * 10000000 + ceil((n - 0.5::float8) / events * runs_each)::int),
       md5('i' || n) || md5('j' || n), at + interval '1 hour', at + interval '5 minutes', at, at
FROM demo.ask, demo.event;

-- Old decisions whose effects cite rows of the activity log.
INSERT INTO decisions (id, company_id, origin_agent_id, origin_issue_id, origin_run_id, title, body, options, status,
                       chosen_option_id, expires_at, signed_spec, target_snapshots, created_at, updated_at)
SELECT demo.id('decision', company.n * 100 + j), company.id, demo.id('agent', company.n * 100 + j),
       demo.id('issue', company.n * 10000000 + j), demo.id('run', company.n * 10000000 + j), 'Proceed?',
       demo.words(j, 90), '[{"id": "yes"}, {"id": "no"}]', 'decided', 'yes', start + interval '7 days',
       md5('k' || company.n || j), '[]', start, start
FROM demo.ask, demo.company, generate_series(1, 5) AS j;

INSERT INTO decision_effect_executions (id, decision_id, effect_index, effect_type, target_issue_id, status,
                                        activity_log_id, executed_at)
SELECT demo.id('effect', company.n * 100 + cited.j), demo.id('decision', company.n * 100 + cited.j), 0,
       'issue.update', cited.issue, 'succeeded', cited.id, cited.created_at
FROM demo.company, LATERAL (
  SELECT row_number() OVER () AS j, id, issue, created_at
  FROM (SELECT id, entity_id::uuid AS issue, created_at FROM activity_log
        WHERE company_id = company.id AND entity_type = 'issue' ORDER BY created_at, id LIMIT 5) AS oldest) AS cited;

-- Ended tasks that the app still counts on: one of each company is cancelled and blocks an open one, waits for an
-- answer, waits for an approval, is held with its tree, is a member of that, has an open one below, is worked on.
CREATE VIEW demo.ended AS
SELECT company.n, company.id AS company, ranked.id, ranked.rank
FROM demo.company, LATERAL (
  SELECT issues.id, row_number() OVER (ORDER BY created_at, issues.id) AS rank FROM issues
  WHERE company_id = company.id AND status IN ('done', 'cancelled') AND hidden_at IS NULL
    AND NOT EXISTS (SELECT FROM decisions WHERE origin_issue_id = issues.id)) AS ranked
WHERE ranked.rank <= 9;

UPDATE issues SET status = 'cancelled', cancelled_at = coalesce(cancelled_at, completed_at), completed_at = NULL
FROM demo.ended WHERE ended.id = issues.id AND rank = 1;
INSERT INTO issue_relations (id, company_id, issue_id, related_issue_id, type, created_at, updated_at)
SELECT demo.id('relation', n), company, ended.id, opened.id, 'blocks', start, start
FROM demo.ask, demo.ended, LATERAL (SELECT issues.id FROM issues WHERE company_id = company
  AND status NOT IN ('done', 'cancelled') ORDER BY created_at, issues.id LIMIT 1) AS opened
WHERE rank = 1;
INSERT INTO issue_thread_interactions (id, company_id, issue_id, kind, status, payload, created_at, updated_at)
SELECT demo.id('interaction', n), company, ended.id, 'request_confirmation', 'pending', '{}', start, start
FROM demo.ask, demo.ended WHERE rank = 2;
INSERT INTO approvals (id, company_id, type, status, payload, created_at, updated_at)
SELECT demo.id('approval', n), company, 'request_board_approval', 'revision_requested', '{}', start, start
FROM demo.ask, demo.ended WHERE rank = 3;
INSERT INTO issue_approvals (company_id, issue_id, approval_id, created_at)
SELECT company, ended.id, demo.id('approval', n), start FROM demo.ask, demo.ended WHERE rank = 3;
INSERT INTO issue_tree_holds (id, company_id, root_issue_id, mode, status, created_at, updated_at)
SELECT demo.id('hold', n), company, ended.id, 'pause', 'active', start, start
FROM demo.ask, demo.ended WHERE rank = 4;
UPDATE issues SET origin_kind = 'onboarding_first_task' FROM demo.ended WHERE ended.id = issues.id AND rank = 5;
INSERT INTO issue_tree_hold_members (id, company_id, hold_id, issue_id, depth, issue_title, issue_status, created_at)
SELECT demo.id('held', n), company, demo.id('hold', n), issues.id, 1, title, status, start
FROM demo.ask, demo.ended, issues WHERE issues.id = ended.id AND rank = 6;
UPDATE issues SET parent_id = ended.id FROM demo.ended
WHERE rank = 7 AND issues.id = (
  SELECT opened.id FROM issues AS opened WHERE opened.company_id = company AND opened.parent_id IS NULL
    AND opened.status NOT IN ('done', 'cancelled') ORDER BY opened.created_at DESC, opened.id LIMIT 1);
UPDATE issues SET execution_run_id = hung.id FROM demo.ended, heartbeat_runs AS hung
WHERE ended.id = issues.id AND rank = 8 AND hung.id = (
  SELECT id FROM heartbeat_runs WHERE company_id = company AND status = 'running' ORDER BY created_at, id LIMIT 1);

ANALYZE companies, "user", session, agents, issues, issue_comments, heartbeat_runs, heartbeat_run_events,
        activity_log, secret_access_events, plugin_logs, tool_call_events, tool_access_audit_events,
        connection_token_issuances, tool_gateway_sessions, decision_effect_executions, verification,
        cli_auth_challenges;
