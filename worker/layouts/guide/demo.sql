-- What the catalogue does not say of the guide's schema: defaults, foreign keys and the indexes its jobs rely on.

ALTER TABLE companies
  ALTER id SET DEFAULT gen_random_uuid(), ALTER status SET DEFAULT 'active', ALTER created_at SET DEFAULT now();

ALTER TABLE agents
  ALTER id SET DEFAULT gen_random_uuid(), ALTER status SET DEFAULT 'idle', ALTER config SET DEFAULT '{}',
  ALTER created_at SET DEFAULT now(), ALTER updated_at SET DEFAULT now(),
  ADD FOREIGN KEY (company_id) REFERENCES companies;
CREATE INDEX agents_company_status_idx ON agents (company_id, status);

ALTER TABLE "authUsers"
  ALTER created_at SET DEFAULT now();
CREATE UNIQUE INDEX auth_users_email_idx ON "authUsers" (email);

ALTER TABLE "authSessions"
  ALTER created_at SET DEFAULT now(), ADD FOREIGN KEY ("userId") REFERENCES "authUsers" ON DELETE CASCADE;
CREATE INDEX auth_sessions_user_idx ON "authSessions" ("userId");
CREATE UNIQUE INDEX auth_sessions_token_idx ON "authSessions" (token);

ALTER TABLE tasks
  ALTER id SET DEFAULT gen_random_uuid(), ALTER status SET DEFAULT 'todo', ALTER archived SET DEFAULT false,
  ALTER created_at SET DEFAULT now(), ALTER updated_at SET DEFAULT now(),
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (assignee_agent_id) REFERENCES agents;
CREATE INDEX tasks_company_status_idx ON tasks (company_id, status);
CREATE INDEX tasks_company_updated_idx ON tasks (company_id, updated_at);

ALTER TABLE activity_log
  ALTER id SET DEFAULT gen_random_uuid(), ALTER actor_type SET DEFAULT 'system', ALTER "timestamp" SET DEFAULT now(),
  ADD FOREIGN KEY (company_id) REFERENCES companies;
CREATE INDEX activity_log_company_timestamp_idx ON activity_log (company_id, "timestamp");
CREATE INDEX activity_log_actor_idx ON activity_log (actor_type, actor_id);

ALTER TABLE company_secrets
  ALTER id SET DEFAULT gen_random_uuid(), ALTER created_at SET DEFAULT now(), ALTER updated_at SET DEFAULT now(),
  ADD FOREIGN KEY (company_id) REFERENCES companies;
CREATE UNIQUE INDEX company_secrets_company_name_idx ON company_secrets (company_id, name);

ALTER TABLE company_secret_versions
  ALTER id SET DEFAULT gen_random_uuid(), ALTER created_at SET DEFAULT now(),
  ADD FOREIGN KEY (secret_id) REFERENCES company_secrets ON DELETE CASCADE;
CREATE UNIQUE INDEX company_secret_versions_secret_version_idx ON company_secret_versions (secret_id, version);

ALTER TABLE agent_api_keys
  ALTER id SET DEFAULT gen_random_uuid(), ALTER created_at SET DEFAULT now(),
  ADD FOREIGN KEY (company_id) REFERENCES companies, ADD FOREIGN KEY (agent_id) REFERENCES agents;
CREATE UNIQUE INDEX agent_api_keys_hash_idx ON agent_api_keys (key_hash);
CREATE INDEX agent_api_keys_company_agent_idx ON agent_api_keys (company_id, agent_id);

ALTER TABLE instance_user_roles
  ALTER role SET DEFAULT 'instance_admin';

ALTER TABLE company_memberships
  ALTER principal_type SET DEFAULT 'user', ALTER role SET DEFAULT 'member', ALTER created_at SET DEFAULT now(),
  ADD FOREIGN KEY (company_id) REFERENCES companies;
CREATE INDEX company_memberships_principal_idx ON company_memberships (principal_type, principal_id);

ALTER TABLE assets
  ALTER id SET DEFAULT gen_random_uuid(), ADD FOREIGN KEY (company_id) REFERENCES companies;
CREATE UNIQUE INDEX assets_object_key_idx ON assets (object_key);


-- rows ----
-- How much of everything is in demo.ask, which demo_schema.py makes. Not chance but a hash of the row decides.

CREATE VIEW demo.company AS
SELECT n, demo.id('company', n) AS id FROM demo.ask, generate_series(1::bigint, companies) AS n;

CREATE VIEW demo.person AS
SELECT n, demo.text_id('user', n) AS id, demo.id('company', (n - 1) % companies + 1) AS company
FROM demo.ask, generate_series(1::bigint, companies * 8) AS n;

INSERT INTO companies (id, name, status, created_at)
SELECT company.id, demo.pick('{Northwind Robotics,Tåresund Maskin,Łódź Analytics,青空ソフト}', n) || ' ' || n, 'active',
       start
FROM demo.ask, demo.company;

INSERT INTO "authUsers" (id, name, email, created_at)
SELECT person.id, demo.pick('{Zoë,Jürgen,Олена,Aroha,李}', demo.dice(n, 1)) || ' ' ||
       demo.pick('{Ångström,Groß,Шевченко,O''Connor}', demo.dice(n, 2)), 'person' || n || '@demo.example', start
FROM demo.ask, demo.person;

-- A session lives 7 days; of 12 over the whole time the last one still does.
INSERT INTO "authSessions" (id, "userId", token, expires_at, created_at)
SELECT demo.text_id('session', n * 100 + k), person.id, demo.text_id('token', n * 100 + k), at + interval '7 days', at
FROM demo.ask, demo.person, generate_series(1, 12) AS k, LATERAL (SELECT start + span * (k / 12.0)) AS moment (at);

INSERT INTO instance_user_roles (user_id, role)
SELECT person.id, 'instance_admin' FROM demo.person WHERE n = 1;

INSERT INTO company_memberships (company_id, principal_type, principal_id, role, created_at)
SELECT company, 'user', person.id, CASE WHEN n <= companies THEN 'owner' ELSE 'member' END, start
FROM demo.ask, demo.person;

INSERT INTO agents (id, company_id, name, status, config, created_at, updated_at)
SELECT demo.id('agent', n * 100 + j), company.id, 'agent ' || j, demo.pick('{idle,running,paused}', j),
       jsonb_build_object('env', jsonb_build_object('LOG_LEVEL', 'info', 'SERVICE_API_KEY', '$secret:service-' || j)),
       start, start
FROM demo.ask, demo.company, generate_series(1, 5) AS j;

INSERT INTO agent_api_keys (id, company_id, agent_id, name, key_hash, revoked_at, created_at)
SELECT demo.id('key', n * 100 + j), company.id, demo.id('agent', n * 100 + j), 'default',
       md5('e' || n || j) || md5('f' || n || j), CASE WHEN j = 5 THEN now END, start
FROM demo.ask, demo.company, generate_series(1, 5) AS j;

-- Names only: a version that no master key opens would be a lie.
INSERT INTO company_secrets (id, company_id, name, created_at, updated_at)
SELECT demo.id('secret', n * 100 + j), company.id, 'service-' || j, start, start
FROM demo.ask, demo.company, generate_series(1, 5) AS j;

INSERT INTO tasks (id, company_id, title, description, status, archived, assignee_agent_id, created_by_user_id,
                   created_at, updated_at)
SELECT demo.id('task', n * 10000000 + k), company.id, 'Task ' || k, demo.words(k, 90 + dice % 300),
       CASE WHEN dice / 64 % 100 < CASE WHEN k > 0.85 * issues_each THEN 45 ELSE 4 END
            THEN demo.pick('{todo,in_progress,blocked}', dice) ELSE 'completed' END,
       false, demo.id('agent', n * 100 + dice % 5 + 1), demo.text_id('user', n), at,
       at + (now - at) * (dice % 50) / 100
FROM demo.ask, demo.company, generate_series(1, issues_each) AS k,
     LATERAL (SELECT demo.dice(n * 10000000 + k, 4), start + span * ((k - 0.5) / issues_each)) AS chance (dice, at);

-- In the order of time, the companies mixed, as an application appends it.
INSERT INTO activity_log (id, company_id, action, actor_type, actor_id, metadata, "timestamp")
SELECT demo.id('activity', n), demo.id('company', c),
       demo.pick('{task.created,task.updated,task.completed,agent.created,agent.terminated,secret.rotated}', dice),
       actor,
       CASE actor WHEN 'user' THEN demo.text_id('user', c + dice / 1024 % 8 * companies)
                  WHEN 'agent' THEN demo.id('agent', c * 100 + dice / 256 % 5 + 1)::text ELSE 'system' END,
       -- As text: building it with functions takes three times as long.
       ('{"taskId": "' || demo.id('task', c * 10000000 + k) || '", "changes": {"tags": ["π", "größe"]}, "note": "'
        || demo.words(n, dice / 16 % 200) || '"}')::jsonb,
       at
FROM demo.ask, generate_series(1, rows) AS n,
     LATERAL (SELECT demo.dice(n, 6), start + span * ((n - 0.5::float8) / rows)) AS chance (dice, at),
     LATERAL (SELECT greatest(1, dice % (companies + 1)), demo.pick('{user,agent,agent,system}', dice / 64),
                     greatest(1, ceil((n - 0.5::float8) / rows * issues_each)::int - dice / 512 % 20))
       AS one (c, actor, k);

ANALYZE companies, "authUsers", "authSessions", agents, tasks, activity_log;
